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
    accuracy = json.loads(found.read_text())
    assert accuracy["16 bit"] >= 0.8 and accuracy["nuq3-1%"] >= 0.8
    assert accuracy["int2"] <= accuracy["nuq3-1%"] - 0.3
