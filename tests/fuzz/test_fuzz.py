"""Forged files are refused by an error of ours, or work; `make fuzz` tries more of them."""

import os

from tests.fuzz.run import fuzz

CASES = int(os.environ.get("NARROWKV_FUZZ", "2000"))


def test_forged_files_are_refused_or_work(tmp_path):
    outcomes = fuzz(0, CASES, 1, tmp_path)
    assert [(case, outcome) for case, outcome in outcomes if outcome not in ("used", "refused")] == []
    assert len(outcomes) == CASES
    assert sum(outcome == "used" for _, outcome in outcomes) > CASES / 20  # forgeries go deep enough to be used at times
