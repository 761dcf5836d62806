"""Several texts and finished calibrations, prompts from everywhere, and targets that are tried before anything is computed."""

import contextlib
import json
import os
import threading

import pytest
from tests.conftest import make_tiny
from tests.letters import TEXT, make_letters

from narrowkv import Calibration
from narrowkv.cli.main import run
from narrowkv.evaluate.results import read_result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, two texts of different letters, and calibrations of two recipes."""
    path = tmp_path_factory.mktemp("tiny")
    make_tiny().save_pretrained(path)
    make_tiny(seed=1).save_pretrained(path / "other")
    for folder in (path, path / "other"):
        make_letters().save_pretrained(folder)
    (path / "one.txt").write_text(TEXT)
    (path / "two.txt").write_bytes(b"\xef\xbb\xbf" + "".join(f"{i} " for i in range(900)).encode())
    for model, recipe, target in ((path, "nuq3", "nuq3"), (path, "nuq2", "nuq2"), (path / "other", "nuq3", "of-other")):
        with contextlib.suppress(SystemExit):
            run(
                [
                    *("calibrate", str(model), "--recipe", recipe, "--out", str(path / target), "--window", "64"),
                    *("--samples", "3", "--text", str(path / "one.txt"), "--text", str(path / "two.txt")),
                ]
            )
    return path


def scored(folder):
    return ("--text", folder / "one.txt", "--text", folder / "two.txt", "--window", 64)


def test_several_texts_share_the_windows(narrowkv, folder, tmp_path):
    learned = Calibration.from_pretrained(folder / "nuq3")
    assert learned.provenance["sequences"] == 3 and learned.provenance["tokens"] == 3 * 64
    small = ("--recipe", "int4", "--limit", 3, "--json", tmp_path / "rows.json")
    assert narrowkv("eval", folder, *scored(folder), *small)[0] == 0
    assert json.loads((tmp_path / "rows.json").read_text())[0]["tokens"] == 3 * 63
    status, _, err = narrowkv("eval", folder, *scored(folder), "--recipe", "int4", "--limit", 1)
    assert status == 1 and "2 texts share the windows, so 1 are too few" in err
    status, _, err = narrowkv(
        "calibrate",
        folder,
        "--out",
        tmp_path / "x",
        "--text",
        folder / "one.txt",
        "--text",
        folder / "two.txt",
        "--samples",
        1,
    )
    assert status == 1 and "2 texts share the windows" in err and not (tmp_path / "x").exists()


SMALL = {
    "calibrate": ("--recipe", "nuq2"),
    "inspect": ("--samples", 1, "--window", 64),
    "tasks": ("--recipes", "nuq3", "--tasks", "passkey", "--lengths", 300, "--depths", 0, "--rows", 1, "--window", 64),
    "ablate": ("--ablations", "sinks", "--bits", 3, "--context", 128, "--window", 64, "--limit", 1),
    "compare": ("--recipes", "nuq2", "--context", 128, "--decode-steps", 0, "--recall-distance", 0, "--limit", 1),
}


@pytest.mark.parametrize("command", SMALL)
def test_the_mix_is_learned_from_where_no_text_is_given(narrowkv, folder, tmp_path, command):
    scored = ("--text", folder / "one.txt", "--window", 64) if command in ("compare", "ablate") else ()
    samples = () if command in ("calibrate", "inspect") else ("--samples", 2)
    status, _, err = narrowkv(command, folder, *SMALL[command], *scored, *samples, "--out", tmp_path)
    assert status == 0 and "the built-in mix is used (narrowkv://mix)" in err
    if command == "calibrate":
        learned = Calibration.from_pretrained(tmp_path)
        assert learned.provenance["sequences"] == 32 and learned.provenance["tokens"] == 32 * 512
    else:
        settings = read_result(tmp_path / f"{command}.json")["settings"]
        assert settings["text" if command == "inspect" else "calibration_text"] == "narrowkv://mix"


def test_the_mix_serves_other_windows_until_it_ends(narrowkv, folder, tmp_path):
    given = ("calibrate", folder, "--recipe", "nuq2", "--out", tmp_path / "tables")
    status, out, _ = narrowkv(*given, "--window", 1000, "--samples", 3)
    assert status == 0 and "learned from 3,000 tokens in 3 sequences" in out
    status, _, err = narrowkv(*given, "--window", 10**6)
    assert status == 1 and "one window needs 1000000" in err


def test_caches_are_calibrated_on_the_mix_only_where_they_learn(narrowkv, folder):
    small = ("--window", 64, "--samples", 2)
    said = ("--prompt", "The fox", "--max-new-tokens", 2, *small)
    status, _, err = narrowkv("generate", folder, *said, "--recipe", "nuq2")
    assert status == 0 and "built-in mix" in err
    scored = ("--text", folder / "one.txt", "--limit", 1, *small)
    status, _, err = narrowkv("eval", folder, *scored, "--recipe", "nuq2")
    assert status == 0 and "built-in mix" in err
    for learned in (("--recipe", "int4"), ("--calibration", folder / "nuq2")):
        assert "mix" not in narrowkv("generate", folder, *said, *learned)[2]
        assert "mix" not in narrowkv("eval", folder, *scored, *learned)[2]


def test_finished_calibrations_are_measured_and_nothing_is_learned(narrowkv, folder, tmp_path, monkeypatch):
    from narrowkv.evaluate import ablate, compare, tasks

    for module in (ablate, compare, tasks):
        monkeypatch.setattr(module, "calibrate_many", None)
    given = ("--calibration", folder / "nuq3", "--calibration", folder / "nuq2")
    status, out, _ = narrowkv("eval", folder, *scored(folder), *given, "--limit", 2, "--json", tmp_path / "rows.json")
    rows = {row["recipe"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert status == 0 and list(rows) == ["nuq3", "nuq2"] and "nuq3: A cache of" in out
    small = ("--context", 128, "--decode-steps", 0, "--recall-distance", 0, "--limit", 2, "--out", tmp_path)
    status, _, err = narrowkv("compare", folder, *scored(folder), *given, *small)
    assert status == 0 and "mix" not in err
    compared = {row["recipe"]: row for row in read_result(tmp_path / "compare.json")["rows"]}
    assert {"nuq3", "nuq2"} < set(compared)
    for name, row in rows.items():
        assert compared[name]["kld_strict"] == row["kld_strict"]
    status, _, err = narrowkv("compare", folder, *scored(folder), "--calibration", folder / "of-other", *small)
    assert status == 1 and "another model" in err
    asked = ("--tasks", "passkey", "--lengths", 400, "--depths", 0, "--rows", 1, "--out", tmp_path)
    assert narrowkv("tasks", folder, "--text", folder / "one.txt", *given, *asked)[0] == 0
    assert [row["recipe"] for row in read_result(tmp_path / "tasks.json")["rows"]] == ["16 bit", "nuq3", "nuq2"]
    ablation = ("--ablations", "outliers", "--bits", 3, "--context", 128, "--samples", 3, "--limit", 2, "--out", tmp_path)
    learned = ("--calibration-text", folder / "one.txt")
    monkeypatch.undo()
    assert narrowkv("ablate", folder, *scored(folder), *learned, "--calibration", folder / "nuq3", *ablation)[0] == 0
    ablation_steps = {row["label"]: row for row in read_result(tmp_path / "ablate.json")["rows"]}
    assert ablation_steps["0.00%"]["tables"] and not ablation_steps["1.00%"]["tables"]


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (("nuq3", "nuq3"), "Two calibrations are given for recipe nuq3"),
        (("of-other",), "another model"),
        (("nuq3", "--recipes", "int4"), "nuq3, which is not among those requested (int4)"),
        (("nuq3", "--recipes", "MINE"), "of another recipe of that name"),
        (("nowhere",), "no folder"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "tasks", "eval"])
def test_calibrations_that_do_not_fit_are_refused(narrowkv, folder, tmp_path, command, given, cause):
    if command == "eval" and "--recipes" in given:
        given, cause = (given[0], "--recipe", "int4"), "either --calibration or --recipe"
    (tmp_path / "mine.json").write_text(json.dumps({**json.loads(json.dumps(_recipe("nuq2"))), "name": "nuq3"}))
    arguments = []
    for part in given:
        arguments += (
            [part if part != "MINE" else tmp_path / "mine.json"]
            if part.startswith(("--", "int4", "MINE"))
            else [
                "--calibration",
                folder / part,
            ]
        )
    target = () if command == "eval" else ("--out", tmp_path / "out")
    status, _, err = narrowkv(command, folder, *scored(folder), *arguments, *target)
    assert status == 1 and err.startswith("Error:") and cause in err and not (tmp_path / "out").exists()


def _recipe(name):
    from narrowkv import get_recipe

    return get_recipe(name).to_dict()


def test_an_ablation_refuses_unknown_steps(narrowkv, folder, tmp_path):
    learned = ("--calibration-text", folder / "one.txt", "--samples", 2, "--limit", 2, "--out", tmp_path / "out")
    for given, cause in ((["nuq2"], "no step of these ablations"), (["nuq3", "nuq3"], "Two calibrations")):
        tables = [part for name in given for part in ("--calibration", folder / name)]
        status, _, err = narrowkv("ablate", folder, *scored(folder), *learned, *tables, "--ablations", "outliers", "--bits", 3)
        assert status == 1 and cause in err and not (tmp_path / "out").exists()


COMMANDS = {
    "calibrate": ("calibrate", "MODEL", "--text", "TEXT", "--out"),
    "compare": ("compare", "MODEL", "--text", "TEXT", "--recipes", "int4", "--out"),
    "ablate": ("ablate", "MODEL", "--text", "TEXT", "--calibration-text", "TEXT", "--out"),
    "inspect": ("inspect", "MODEL", "--text", "TEXT", "--out"),
    "tasks": ("tasks", "MODEL", "--recipes", "int4", "--out"),
    "plan": ("plan", "llama-7b", "--out"),
    "report": ("report", "narrowkv://demo", "--out"),
    "eval": ("eval", "MODEL", "--text", "TEXT", "--recipe", "int4", "--json"),
    "demo": ("demo", "--json"),
    "env": ("env", "--json"),
    "export": ("export", "MODEL", "--format", "onnxruntime-genai", "--text", "TEXT", "--out"),
    "recipes": ("recipes", "show", "int4", "--json"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_output_path_is_checked_first(narrowkv, folder, tmp_path, monkeypatch, command):
    arguments = [{"MODEL": "no/such/model", "TEXT": folder / "one.txt"}.get(part, part) for part in COMMANDS[command]]
    file = tmp_path / "file"
    file.write_text("mine")
    monkeypatch.chdir(tmp_path)
    bad = [
        ("", "name"),
        (file / "below", "Cannot write"),
        ("/proc/x/y", "Cannot write"),
        (tmp_path / ("x" * 300), "Cannot write"),
    ]
    bad.append((file, "is a file") if arguments[-1] == "--out" else (tmp_path, "is not the name of a file"))
    for target, cause in bad:
        status, _, err = narrowkv(*arguments, target)
        assert status == 1 and err.startswith("Error:") and cause in err, (target, err)  # not that there is no such model
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "mine"


@pytest.fixture
def generated(narrowkv, folder):
    """What is generated from a prompt file, without sampling."""

    def call(*prompt):
        return narrowkv("generate", folder, *prompt, "--recipe", "int4", "--max-new-tokens", 4)

    return call


def test_a_prompt_is_the_same_from_everywhere(generated, tmp_path, monkeypatch):
    status, expected, printed = generated("--prompt", "The fox\nis")
    assert status == 0
    for content in (b"The fox\nis", b"\xef\xbb\xbfThe fox\nis", b"\xef\xbb\xbfThe fox\r\nis"):
        (tmp_path / "prompt.txt").write_bytes(content)
        assert generated("--prompt-file", tmp_path / "prompt.txt") == (0, expected, printed)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"\xef\xbb\xbfThe fox\nis",))
    writer.start()
    assert generated("--prompt-file", pipe) == (0, expected, printed)
    writer.join()
    before = os.dup(0)
    try:
        for name in ("-", "/dev/stdin"):
            with open(tmp_path / "prompt.txt", "rb") as file:
                os.dup2(file.fileno(), 0)
            assert generated("--prompt-file", name) == (0, expected, printed)
    finally:
        os.dup2(before, 0)
        os.close(before)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("narrowkv://train", "narrowkv://train is no file, and texts of that kind are no prompts"),
        ("no/such/file", "There is no file 'no/such/file'; check the path, or give the prompt itself with --prompt"),
        ("", "There is no file ''"),
        (".", "is a folder; name a file with the prompt"),
        ("EMPTY", "empty.txt is empty, and a prompt is not"),
        ("MARK", "mark.txt is empty, and a prompt is not"),
        ("BYTES", "Cannot read"),
    ],
)
def test_what_is_no_prompt_is_said(generated, tmp_path, name, cause):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00x")
    name = tmp_path / f"{name.lower()}.txt" if name.isupper() else name
    status, _, err = generated("--prompt-file", name)
    assert status == 1 and err.startswith("Error:") and cause in err


def test_a_warning_of_ours_is_one_sentence(narrowkv, folder, tmp_path, monkeypatch):
    from narrowkv.integrations import calibrator

    monkeypatch.setattr(calibrator, "MOST_OF_FEW", 0.0)
    options = ("--text", folder / "one.txt", "--window", 64, "--samples", 2, "--out", tmp_path / "c")
    status, out, err = narrowkv("calibrate", folder, "--recipe", "nuq3", *options)
    assert status == 0 and "saved in" in out
    assert err.startswith("Warning: One token in a hundred has more than half") and "capture.py" not in err
