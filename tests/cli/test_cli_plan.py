"""`narrowkv plan` as a user meets it."""

import json

import pytest

from narrowkv.cli.main import run


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(["plan", *map(str, arguments)])
    return stop.value.code, capsys.readouterr()


def test_a_plan_is_printed_and_written_and_goes_on(tmp_path, capsys):
    options = ("narrowkv://demo", "--memory", "64MB", "--recipes", "fp16,nuq3-1%", "--context", "4K,16K", "--out", tmp_path)
    status, printed = call(capsys, *options)
    assert not status
    assert "nuq3-1%" in printed.out and "16K" in printed.out and "Longest context" in printed.out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["kind"] == "plan" and [row["recipe"] for row in written["rows"]] == ["fp16", "nuq3-1%"]
    assert (tmp_path / "plan-memory.svg").exists()
    (tmp_path / "plan.json").write_text(json.dumps(written | {"rows": written["rows"][:1]}))
    assert not call(capsys, *options)[0]
    assert json.loads((tmp_path / "plan.json").read_text())["rows"] == written["rows"]
    status, printed = call(capsys, *options, "--batch", 2)
    assert status == 1 and "other settings" in printed.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("llama-7b", "--memory", "12GB"), "leaves no space"),
        (("llama-7b", "--gpus", "5"), "cannot share 32 KV heads"),
        (("llama-7b", "--gpus", "0"), "one GPU at least"),
        (("llama-7b", "--memory", "80XB"), "not a size such as"),
        (("llama-7b", "--context", "long"), "not a number of tokens"),
        (("llama-7b", "--recipes", "nope"), "no recipe 'nope'"),
        (("llama-7b", "--weight-bits", "0"), "more than 0"),
        (("/nowhere/at/all",), "There is no file or folder /nowhere/at/all"),
    ],
)
def test_unplannable_models_are_refused_in_one_sentence(options, words, tmp_path, capsys):
    status, printed = call(capsys, *options, "--out", tmp_path)
    assert status == 1
    assert words in " ".join(printed.err.split()) and "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())
