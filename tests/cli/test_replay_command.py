"""`narrowkv replay` as a user meets it."""

import os
import signal

import pytest
from tests.evaluate.claims import RESULT, write_clone

from narrowkv.evaluate import replay


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone, in which the command is given."""
    monkeypatch.chdir(write_clone(tmp_path))
    return tmp_path


def test_claims_are_listed(clone, narrowkv):
    status, out, _ = narrowkv("replay", "--list")
    assert not status and out == "toy (README.md, replayed in CI) A cache takes 1,000 bytes, all told."


def test_a_toy_claim_is_replayed_in_earnest(clone, narrowkv):
    """The command runs, and its figure is what the planner finds today."""
    status, out, err = narrowkv("replay", "toy", "--here", "--out", clone / "replays")
    assert status == 1 and out.startswith("differs toy bytes: claimed 1,000, found ") and "0 ok, 1 differs" in err
    assert "Running narrowkv plan narrowkv://demo --context 4K" in err
    found = float(out.split("found ")[1].split(", tolerance")[0].replace(",", ""))
    rows = [{"recipe": "int4", "contexts": [{"tokens": 4096, "prompt": found}]}]
    write_clone(clone, result=RESULT | {"rows": rows})
    status, out, err = narrowkv("replay", "--all", "--here", "--out", clone / "replays")
    assert not status and out.startswith("ok toy bytes: ") and "1 ok, 0 differs, 0 skipped" in err
    assert "Running" not in err


def test_a_failed_command_differs(clone, narrowkv):
    write_clone(clone, run={"here": "narrowkv plan nowhere/at/all --out {out}"})
    status, out, _ = narrowkv("replay", "toy", "--here")
    assert status == 1 and "differs toy bytes: its command ended with status 1; see" in out
    assert "nowhere/at/all" in (clone / "build" / "replays" / "here" / "plan" / "output.txt").read_text()


def test_a_skipped_claim_is_no_failure(clone, narrowkv, monkeypatch):
    command = "python -m benchmarks.real_models {models}/tiny --out {out}"
    write_clone(clone, run={"command": command, "here": command})
    monkeypatch.delenv("NARROWKV_MODELS", raising=False)
    status, out, err = narrowkv("replay", "toy")
    assert not status and out.startswith("skipped toy bytes: it needs the model tiny") and "1 skipped" in err
    monkeypatch.setenv("NARROWKV_MODELS", str(clone))
    assert "tiny does not exist" in narrowkv("replay", "toy")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "No claim is named"),
        (("moon",), "There is no claim called moon"),
        (("toy", "--out", "README.md/x"), "Cannot write"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(arguments, words, clone, narrowkv):
    (clone / "README.md").touch()
    status, _, err = narrowkv("replay", *arguments)
    assert status == 1 and words in err and "Traceback" not in err


def test_forged_claims_are_refused_in_one_sentence(clone, narrowkv):
    write_clone(clone, run={"here": "narrowkv plan x --out {out}; touch owned"})
    status, _, err = narrowkv("replay", "--all", "--here")
    assert status == 1 and "is not a plain option" in err and "Traceback" not in err
    assert not (clone / "owned").exists()


def test_outside_of_a_clone_one_sentence_says_so(tmp_path, monkeypatch, narrowkv):
    monkeypatch.chdir(tmp_path)
    status, out, err = narrowkv("replay", "--all")
    assert status == 1 and not out and "is in no clone of NarrowKV" in err and "Traceback" not in err


def test_a_signal_ends_the_command_too(clone, narrowkv, monkeypatch):
    ended = []

    def run(*given):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            ended.append(given)

    monkeypatch.setattr(replay, "execute", run)
    before = signal.getsignal(signal.SIGTERM)
    assert narrowkv("replay", "toy")[0] == 128 + signal.SIGTERM and ended
    assert signal.getsignal(signal.SIGTERM) is before
