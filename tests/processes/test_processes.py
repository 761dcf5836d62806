"""Two processes on this machine (gloo): a split model decodes as the whole one, shared calibration gives the same file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from narrowkv import Calibration, Outliers, Quantization, Recipe, Scheme, Transform, calibrate
from narrowkv.calibration.calibration import FILE
from tests.conftest import make_tiny
from tests.processes.worker import RECIPES, decode, text

ROOT = Path(__file__).parents[2]
SHAPE = {"kv_heads": 2, "vocabulary": 98}  # even: transformers 5.19 divides the last layer too


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with float32 weights, a calibration, and a recipe whose ranges are those of a token in one head."""
    path = tmp_path_factory.mktemp("processes")
    model = make_tiny(**SHAPE)
    model.save_pretrained(path / "model")
    token_head = Scheme(Quantization(4, "int", strategy="token_head"), outliers=Outliers(0.02))
    keys = Scheme(Quantization(3, "nuq", strategy="channel"), Transform(pre_rope=True), Outliers(0.01))
    calibrate(
        model, text(), Recipe("heads", keys=keys, values=Scheme(Quantization(4, "nuq", strategy="token_head")))
    ).save_pretrained(path / "calibration")
    recipe = Recipe("token and head", keys=token_head, values=token_head, sinks=2)
    (path / "token_head.json").write_text(json.dumps(recipe.to_dict()))
    return path


def test_a_model_split_over_two_processes_decodes_as_the_whole_one(folder):
    torchrun("-m", "tests.processes.worker", "split", folder)
    model = make_tiny(**SHAPE)
    whole = decode(model, folder)
    parts = [torch.load(folder / f"split.{rank}.pt") for rank in range(2)]
    for name in ("fp16", "token and head", "calibrated"):
        for part in parts:
            assert torch.equal(part["dynamic"], whole["dynamic"])
            assert torch.equal(part[name], whole[name]), name
            assert part[f"{name}, bytes"] < 0.7 * whole[f"{name}, bytes"]
        for layer, elements in enumerate(whole[f"{name}, stored"]):
            for side, expected in enumerate(elements):
                halves = [part[f"{name}, stored"][layer][side] for part in parts]
                torch.testing.assert_close(torch.cat(halves, dim=1)[:, :, :90], expected[:, :, :90], atol=1e-3, rtol=1e-3)
    assert all("cannot be calibrated; calibrate it whole" in part["refusal"] for part in parts)


def test_processes_that_share_the_data_learn_what_one_learns_from_all_of_it(folder, monkeypatch):
    torchrun("-m", "tests.processes.worker", "shared", folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for recipe in RECIPES:
            calibrate(make_tiny(**SHAPE), text(), recipe).save_pretrained(folder / "alone" / recipe)
            alone = (folder / "alone" / recipe / FILE).read_bytes()
            for rank in range(2):
                assert (folder / f"shared.{rank}" / recipe / FILE).read_bytes() == alone, recipe
    finally:
        torch.set_num_threads(threads)


def test_the_command_shares_its_text_between_processes(tmp_path):
    arguments = ["-m", "narrowkv", "calibrate", "narrowkv://demo", "--recipe", "nuq2", "--window", "64", "--samples", "4"]
    torchrun(*arguments, "--out", tmp_path / "calibration")
    assert Calibration.from_pretrained(tmp_path / "calibration").provenance["tokens"] == 256
