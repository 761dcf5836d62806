"""Every check and measurement that waits for a GPU, in one call: `make gpu` (`python -m benchmarks.gpu_all [--minutes 11.5]`).

Runs the tests of kernels that need no interpreter, then `benchmarks.gpu`, then `benchmarks.gpu_million` in what time is left,
each in a process of its own, and writes one JSON file for the card and one page, `tools/gpu_table.py`'s, of it. What fails or
does not fit is named in both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import facts

ROOT = Path(__file__).parents[1]
TESTS = ("tests/codec/test_cuda_encode.py", "tests/codec/test_cuda_pack.py", "tests/codec/test_cuda_trellis.py")
MILLION = "narrow2"  # the recipe by which a million tokens are held
SHARES = {"tests": 0.12, "gpu": 0.78}  # of the time; the rest is for a million tokens


class Runner:
    """Runs commands until a time, and notes those that fail."""

    def __init__(self, minutes: float):
        self.begin, self.seconds = time.time(), 60 * minutes
        self.failed: list[str] = []

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over."""
        return max(self.begin + share * self.seconds - time.time(), 1.0)

    def run(self, *command: str, seconds: float) -> str:
        """What a command of Python's printed."""
        print(" ".join(command), flush=True)
        found = ""
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=os.environ | {"TRITON_INTERPRET": "0"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
                check=False,
            )
            found, why = done.stdout, f"status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as late:
            found, why = str(late.stdout or ""), "out of time"
        if why:
            self.failed.append(f"{' '.join(command[:2])}: {why}: {found[-500:]}")
        print(found[-2000:], flush=True)
        return found


def measure(minutes: float) -> dict[str, Any]:
    """All results, by part."""
    runner = Runner(minutes)
    tests = runner.run("pytest", "-q", "-o", "addopts=", *TESTS, seconds=runner.left(SHARES["tests"]))
    with tempfile.TemporaryDirectory() as folder:
        until = SHARES["tests"] + SHARES["gpu"]
        share = runner.left(until) / 60 - 0.25  # a quarter of a minute to come to an end
        runner.run("benchmarks.gpu", "--out", folder, "--minutes", f"{share:.2f}", seconds=runner.left(until))
        runner.run("benchmarks.gpu_million", "--recipe", MILLION, "--out", folder, seconds=runner.left())
        files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json")}
    found: dict[str, Any] = next((part for name, part in files.items() if name.startswith("gpu-")), {"left_out": []})
    found.setdefault("facts", facts(torch.device("cuda")) | {"copy_gigabytes_per_second": float("nan")})
    found["tests"] = tests.strip().splitlines()[-1:] or ["nothing"]
    found["million"] = next((part for name, part in files.items() if name.startswith("million-")), None)
    found["left_out"] += runner.failed
    found["seconds"] = round(time.time() - runner.begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=11.5)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "This needs a GPU that torch can use by CUDA; run it on one.\n")
    found = measure(arguments.minutes)
    card = torch.cuda.get_device_properties(0).name
    name = "".join(c if c.isalnum() else "-" for c in card).strip("-").lower()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"gpu-{name}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    page = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu_table.py", path], stdout=subprocess.PIPE, text=True, check=True
    )
    path.with_suffix(".md").write_text(page.stdout, encoding="utf-8")
    print(f"wrote {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
