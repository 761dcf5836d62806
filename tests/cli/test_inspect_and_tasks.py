"""`narrowkv inspect` and `narrowkv tasks` on a tiny model: files written, runs that go on, one sentence on errors."""

import json

import pytest
from tests.conftest import make_tiny
from tests.letters import TEXT, make_letters

from narrowkv.cli.main import run


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Folders and files that commands name."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny().save_pretrained(folder / "model")
    make_letters().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "bad.jsonl").write_text('{"input": "x"}\n')
    return {"MODEL": str(folder / "model"), "TEXT": str(folder / "text.txt"), "BAD": str(folder / "bad.jsonl")}


@pytest.fixture
def narrowkv(names, tmp_path, capsys):
    def call(command):
        with pytest.raises(SystemExit) as stop:
            run([{**names, "OUT": str(tmp_path / "out")}.get(word, word) for word in command.split()])
        captured = capsys.readouterr()
        return stop.value.code or 0, " ".join(captured.out.split()), " ".join(captured.err.split())

    return call


LOOK = "inspect MODEL --out OUT --text TEXT --window 64"
ASK = "tasks MODEL --out OUT --recipes int4 --text TEXT"


def test_inspect(narrowkv, tmp_path):
    status, out, _ = narrowkv(f"{LOOK} --samples 2 --layer 0")
    assert status == 0 and "t99.99" in out and "keys before RoPE" in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    plots = ("magnitude", "outliers", "distribution", "ranges", "fisher")
    assert names == {"inspect.json", *(f"inspect-{name}.svg" for name in plots)}
    saved = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert saved["settings"]["layer"] == 0 and saved["command"].startswith("narrowkv inspect ")


def test_tasks(narrowkv, tmp_path):
    status, out, _ = narrowkv(f"{ASK} --tasks passkey --lengths 300 --depths 0,1 --rows 2")
    assert status == 0 and "16 bit" in out and "int4" in out and "does not do passkey" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tasks.json", "tasks-passkey.svg"}
    status, _, _ = narrowkv(f"{ASK} --tasks passkey --lengths 300 --depths 0.5 --rows 2")
    rows = json.loads((tmp_path / "out" / "tasks.json").read_text())["rows"]
    assert status == 0 and [row["depth"] for row in rows] == [0.0, 0.0, 1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        (f"{LOOK} --window 5000", "one window needs"),
        (f"{LOOK} --layer 7", "choose one of 0, 1"),
        (f"{LOOK} --recipe narrow3", "no codebook"),
        (f"{LOOK} --recipe nuq9", "9 bits"),
        ("inspect MODEL --out /proc/x --text TEXT --window 64", "Cannot write"),
        (f"{ASK} --tasks poem", "no task 'poem'"),
        (f"{ASK} --lengths many", "--lengths takes elements"),
        (f"{ASK} --depths 2", "--depths takes elements"),
        (f"{ASK} --lengths 4096", "512 positions"),
        (f"{ASK} --tasks none --file BAD", "bad.jsonl, line 1"),
    ],
)
def test_bad_input_is_one_sentence(narrowkv, tmp_path, command, cause):
    status, _, err = narrowkv(command)
    assert status == 1 and err.startswith("Error:") and cause in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
