"""Claims replayed: what is run, what is taken up again, and how figures are compared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.evaluate.claims import RESULT, write_clone

from narrowkv.errors import OutputError
from narrowkv.evaluate import replay
from narrowkv.evaluate.claims import IN_CI, read_claims
from narrowkv.evaluate.replay import Outcome, Replay, code_checksum, compare, execute

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(monkeypatch):
    """Commands that would have run; each writes a result whose cache has the next of the sizes, if there is one."""
    sizes = []

    def pretend(root, command, folder, models):
        commands.append(command)
        if not sizes:
            return 3
        rows = [{"recipe": "int4", "contexts": [{"tokens": 4096, "prompt": sizes.pop(0)}]}]
        (folder / "plan.json").write_text(json.dumps(RESULT | {"rows": rows}))
        return 0

    commands = []
    monkeypatch.setattr(replay, "execute", pretend)
    return commands, sizes


def outcome(clone, here=False, out="out", **settings):
    claims = read_claims(clone)
    (found,) = Replay(claims, clone / out, here, **settings).outcomes(claims.claims["toy"])
    return found


def test_a_figure_is_compared_within_its_tolerance(tmp_path, runs):
    _, sizes = runs
    sizes += [1009, 1011]
    clone = write_clone(tmp_path)
    assert outcome(clone) == Outcome("toy", "bytes", "ok", "1,000", "1,009", "1%")
    assert outcome(clone, out="other") == Outcome("toy", "bytes", "differs", "1,000", "1,011", "1%")


def test_a_complete_result_is_not_made_again(tmp_path, runs):
    commands, sizes = runs
    sizes += [1000, 1500, 1000]
    clone = write_clone(tmp_path, figure={"tolerance_here": 0.5})
    assert outcome(clone).verdict == outcome(clone).verdict == "ok" and len(commands) == 1
    assert outcome(clone, here=True) == Outcome("toy", "bytes", "ok", "1,000", "1,500", "50%")
    assert [("4K,8K" in command) for command in commands] == [True, False]
    other = write_clone(tmp_path, run={"command": "narrowkv plan llama-7b --out {out}"})
    assert outcome(other).verdict == "ok" and "llama-7b" in commands[2]


def test_an_interrupted_run_goes_on_and_one_of_other_code_is_removed(tmp_path, runs, monkeypatch):
    commands, sizes = runs
    clone = write_clone(tmp_path)
    assert "status 3; see" in outcome(clone).why and outcome(clone).verdict == "differs"
    (tmp_path / "out" / "full" / "plan" / "half").touch()
    sizes += [1000, 1000]
    assert outcome(clone).verdict == "ok" and (tmp_path / "out" / "full" / "plan" / "half").exists()
    monkeypatch.setattr(replay, "code_checksum", lambda root: "other")
    assert outcome(clone).verdict == "ok" and not (tmp_path / "out" / "full" / "plan" / "half").exists()
    assert len(commands) == 4


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, runs):
    folder = tmp_path / "out" / "full" / "plan"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").touch()
    with pytest.raises(OutputError, match="holds no replay"):
        outcome(write_clone(tmp_path))
    assert (folder / "thesis.txt").exists() and not runs[0]


def test_what_this_machine_lacks_is_skipped(tmp_path, runs, monkeypatch):
    command = "python -m benchmarks.real_models {models}/tiny --out {out}"
    clone = write_clone(tmp_path, run={"command": command, "here": command})
    assert outcome(clone).verdict == "skipped" and "--models or NARROWKV_MODELS" in outcome(clone).why
    assert "tiny does not exist" in outcome(clone, models=tmp_path).why
    (tmp_path / "tiny").mkdir()
    runs[1].append(1000)
    assert outcome(clone, models=tmp_path).verdict == "ok"
    clone = write_clone(tmp_path, run={"status": "needs a GPU"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert outcome(clone) == Outcome("toy", "bytes", "skipped", why="it needs a GPU")
    clone = write_clone(tmp_path, figure={"here": False})
    assert outcome(clone, here=True) == Outcome("toy", "bytes", "skipped", why="it is no part of the short form")
    assert len(runs[0]) == 1


def test_a_result_that_is_missing_or_lacks_rows_differs(tmp_path, runs, monkeypatch):
    clone = write_clone(tmp_path)
    monkeypatch.setattr(replay, "execute", lambda *given: 0)
    assert "plan.json does not exist" in outcome(clone).why and outcome(clone).verdict == "differs"
    clone = write_clone(tmp_path, run={"writes": "plan.json"}, result={"rows": []})
    (tmp_path / "out" / "full" / "plan" / "plan.json").write_text(json.dumps(RESULT))
    assert outcome(clone) == Outcome("toy", "bytes", "differs", why="the committed results lack rows")
    assert json.loads((tmp_path / "out" / "full" / "plan" / "replay.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("how", "found", "here", "verdict", "shown"),
    [
        ("each", [1, 2], False, "ok", "1.00"),
        ("each", [1.1, 2.4], False, "differs", "2.40"),
        ("each", [1.1, 2.2], True, "ok", "1.10"),
        ("each", [None, 2.2], True, "ok", "2.20"),
        ("each", [None, 2.2], False, "differs", ""),
        ("each", [None, None], True, "differs", ""),
        ("sum", [None, None], True, "differs", ""),
    ],
)
def test_of_each_that_which_differs_most_counts(how, found, here, verdict, shown, tmp_path):
    figure = {"how": how, "format": ".2f", "tolerance": 0.101, "tolerance_here": 0.101}
    figure = read_claims(write_clone(tmp_path, figure=figure, claim={"block": "table"})).claims["toy"].figures["bytes"]
    compared = compare("toy", "bytes", figure, [1, 2], found, here)
    assert (compared.verdict, compared.found) == (verdict, shown)


def test_a_command_runs_in_the_clone_without_a_shell(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        subprocess, "run", lambda words, **how: given.update(words=words, **how) or subprocess.CompletedProcess(words, 0)
    )
    folder = tmp_path / "a folder"
    folder.mkdir()
    command = "python -m benchmarks.peers {models}/tiny --peers 'KVarN, 4 bits' --out {out}"
    assert execute(tmp_path, command, folder, tmp_path / "models; id") == 0
    tiny = str(tmp_path / "models; id" / "tiny")
    assert given["words"] == [sys.executable, "-m", "benchmarks.peers", tiny, "--peers", "KVarN, 4 bits", "--out", str(folder)]
    assert given["cwd"] == tmp_path and not given.get("shell")
    execute(tmp_path, "narrowkv env --json {out}/env.json", folder, None)
    assert given["words"] == [sys.executable, "-m", "narrowkv", "env", "--json", f"{folder}/env.json"]


def test_code_has_a_checksum_where_there_is_git(tmp_path):
    assert code_checksum(tmp_path) is None
    if (ROOT / ".git").exists():
        assert len(code_checksum(ROOT).split()) == 3


def test_claims_that_are_replayed_in_ci_are_replayed_here(tmp_path):
    """Their sentences are true now: the commands run in earnest."""
    claims = read_claims(ROOT)
    wanted = [claim for claim in claims.claims.values() if claims.status(claim) == IN_CI]
    assert wanted
    made = Replay(claims, tmp_path, here=True)
    outcomes = [outcome for claim in wanted for outcome in made.outcomes(claim)]
    assert {outcome.verdict for outcome in outcomes} == {"ok"}, outcomes
