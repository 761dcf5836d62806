"""The examples run as they stand."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_evaluation_harness_sees_the_quantized_cache(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, "examples/harness.py", "--rows", "12", "--json", str(found)]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy = {row["recipe"]: row["accuracy"] for row in json.loads(found.read_text())["rows"]}
    assert accuracy["16 bit"] >= 0.8 and accuracy["nuq3-1%"] >= 0.8
    assert accuracy["int2"] <= accuracy["nuq3-1%"] - 0.3


def test_adapters_are_trained_saved_and_measured(tmp_path):
    found = tmp_path / "found.json"
    size = ["--steps", "2", "--window", "64", "--measured", "1", "--recipe", "kivi-2-r32"]
    command = [sys.executable, "examples/train_adapters.py", *size, "--out", str(tmp_path / "adapters"), "--json", str(found)]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out: KLD" in done.stdout and (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    result = json.loads(found.read_text())
    (row,) = result["rows"]
    assert str(tmp_path) not in result["command"] and result["command"].endswith("--out adapters --json found.json")
    assert row["before"]["kld"] > 0 and row["after"]["kld"] > 0 and row["before"]["kld"] != row["after"]["kld"]
    assert row["before"]["perplexity_fp"] == row["after"]["perplexity_fp"] < row["before"]["perplexity"]
