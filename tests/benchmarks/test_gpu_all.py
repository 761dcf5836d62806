"""What `make gpu` does where there is no GPU, and with what fails."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu_store import filled

from benchmarks import gpu_all
from narrowkv.store import BLOCK

SPEC = importlib.util.spec_from_file_location("gpu_table", Path(__file__).parents[2] / "tools" / "gpu_table.py")
FACTS = dict.fromkeys(("card", "date", "torch", "triton", "cuda", "narrowkv"), "x") | {"copy_gigabytes_per_second": 1.0}


def test_without_a_gpu_it_refuses_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_all"])
    with pytest.raises(SystemExit) as stopped:
        gpu_all.main()
    assert stopped.value.code == 1 and capsys.readouterr().err.count(".") == 1


def test_commands_that_fail_or_take_too_long_are_named():
    runner = gpu_all.Runner(1.0)
    assert "usage" in runner.run("json.tool", "--help", seconds=60) and not runner.failed
    runner.run("json.tool", "/nowhere", seconds=60)
    runner.run("timeit", "-s", "import time", "time.sleep(9)", seconds=0.5)
    assert "status" in runner.failed[0] and "out of time" in runner.failed[1]


@pytest.mark.parametrize("name", ["nuq2-1%", "narrow2"])
def test_a_store_of_any_length_repeats_the_blocks_that_were_encoded(name):
    store = filled(name, 34 * BLOCK, 1, 1, torch.device("cpu"), torch.float16)
    for side in store.read(34 * BLOCK):
        assert torch.equal(side[:, :, BLOCK : 2 * BLOCK], side[:, :, 33 * BLOCK :])  # the first block has a sink


def test_its_page_says_what_was_left_out():
    table = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(table)
    measured = {"tokens": 7, "cache_bytes": 2e9, "attention_milliseconds": 1.5, "gigabytes_per_second": 3.0}
    million = {"recipe": "narrow2", "measured": measured}
    page = table.page({"facts": FACTS, "tests": ["5 passed"], "million": million, "left_out": ["that"]})
    assert "5 passed" in page and "| narrow2 | 7 | 2 | 1.5 | 3 |" in page and "Left out: that" in page
