"""Kernels compiled ahead of time for three generations of GPUs: matrix units are used, little or nothing is spilled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from narrowkv.codec.cuda import encode as cuda
from narrowkv.methods.registry import recipe_names

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(cuda.kernels() is None, reason="needs Triton (`pip install triton`)"),
]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_without_spills(architecture, tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, "tools/compile_kernels.py", "--architectures", str(architecture), "--json", str(found)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for row in json.loads(found.read_text(encoding="utf-8"))["rows"]:
        kernel, exact, _ = row["kernel"].partition(", float32")
        few = (192 if exact else 96) if kernel.startswith("narrow") else 64 if exact else 0
        assert row["spills"] <= few and row["shared"] < 100_000, row
        assert row["matrix"] > 0 or kernel not in recipe_names(), row
