"""`narrowkv chat` with turns from standard input."""

import io
import os
import signal

import pytest
from tests.conftest import make_tiny
from tests.gguf_files import write_gguf

from narrowkv.cli.main import run

OPTIONS = ("--recipe", "int4", "--max-new-tokens", "6")


@pytest.fixture
def chat(capsys, monkeypatch):
    """Talk with the built-in model, or another; returns (exit status, standard output, standard error)."""

    def call(said, *options, model="narrowkv://demo"):
        raw = said if isinstance(said, bytes) else said.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        with pytest.raises(SystemExit) as stop:
            run(["chat", str(model), *OPTIONS, *options])
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, " ".join(printed.err.split())

    return call


def test_each_turn_is_answered_and_reports_the_cache(chat):
    status, out, err = chat("The password is silent harbour.\n\nThe password is\n")
    assert status == 0 and len(out.strip()) > 5
    assert err.count("bits per element") == 2 and "no chat template" in err
    stored = [int(part.split()[-1]) for part in err.split(" tokens in ")[:2]]
    assert stored[0] < stored[1]


def test_reset_begins_anew_and_exit_leaves(chat):
    status, out, err = chat("Name a color\n/reset\nName a color\n/help\n/exit\nnever asked\n")
    first, second = [part.split()[-1] for part in err.split(" tokens in ")[:2]]
    assert status == 0 and first == second and err.count("bits per element") == 2 and "/reset clears" in err
    answers = [line for line in out.split("\n") if line.strip()]
    assert len(answers) % 2 == 0 and answers[: len(answers) // 2] == answers[len(answers) // 2 :]


def test_a_gguf_file_uses_its_chat_template(chat, tmp_path):
    pytest.importorskip("gguf", reason="needs `pip install 'narrowkv[gguf]'`")
    file = write_gguf(make_tiny("qwen2", layers=1), tmp_path / "tiny.gguf")
    status, _, err = chat("Hi\nAgain\n", "--temperature", "0.7", "--top-p", "0.9", "--system", "Kind", model=file)
    assert status == 0 and "no chat template" not in err and "tiny.gguf" in err and err.count("bits per element") == 2


def test_an_empty_chat_ends_without_an_error(chat, monkeypatch):
    assert chat("")[0] == 0
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as stop:
        run(["chat", "narrowkv://demo", *OPTIONS])
    assert not stop.value.code


def test_files_that_are_no_text_raise(chat):
    status, _, err = chat(b"\xff\n")
    assert status == 1 and err.endswith("write it in UTF-8.") and "Traceback" not in err


def test_a_plan_beyond_the_models_positions_warns(chat):
    status, _, err = chat("word " * 3000 + "\n")
    assert status == 1 and "positions; begin a new one" in err


def test_an_interrupt_ends_the_answer_and_not_the_conversation(chat, monkeypatch):
    from narrowkv.cli import chat as module

    show = module._show

    def interrupt(words):
        show(words)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(module, "_show", show)

    monkeypatch.setattr(module, "_show", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    status, _, err = chat("Tell me a long story\nAnd then?\n", "--max-new-tokens", "40")
    assert status == 0 and err.count("bits per element") == 2 and signal.getsignal(signal.SIGINT) is handler
