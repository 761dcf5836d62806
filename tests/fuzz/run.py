"""The fuzz: `python -m tests.fuzz.run --cases 100000 --processes 2`; a case that failed again: `--first N --cases 1`.

Every file of the corpus is forged at random, with its checksums made right, loaded, and used. It may work, or be refused by an
error of ours. Anything else is a failure: a crash, another error, a case that never ends, memory that grows by 300 MB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.corpus import build

SLOW, SLOW_TO_BEGIN = 120, 1200  # seconds, after which a case, or what comes before the first one, is said never to end


class Worker:
    """A process that is started again behind the case that killed it."""

    def __init__(self, corpus: Path, scratch: Path, cases: range):
        scratch.mkdir()
        self.corpus, self.scratch, self.cases = corpus, scratch, cases
        self.lost: list[tuple[int, str]] = []  # cases that left no outcome
        self._start()

    def _start(self) -> None:
        cases = (self.cases.start, self.cases.stop, self.cases.step)
        command = [sys.executable, "-m", "tests.fuzz.worker", str(self.corpus), str(self.scratch), *map(str, cases)]
        self.errors = (self.scratch / "errors").open("w+")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=self.errors, env=environment)
        self.seen, self.since = -1, time.monotonic()

    def poll(self) -> bool:
        """Whether it still runs; notes a crash, or ends a case that does not end, and goes on behind it."""
        case, status = self._case(), self.process.poll()
        if case != self.seen:
            self.seen, self.since = case, time.monotonic()
        if status is None and time.monotonic() - self.since > (SLOW if case >= self.cases.start else SLOW_TO_BEGIN):
            self.process.kill()
            status = self.process.wait()
        if status is None or status == 0:
            return status is None
        self.errors.seek(0)
        said = self.errors.read()[-4000:]
        if case < self.cases.start:
            raise RuntimeError(f"the fuzz could not begin:\n{said}")
        self.lost.append((case, f"crashed ({status})\n{said}"))
        self.cases = range(case + self.cases.step, self.cases.stop, self.cases.step)
        self._start()
        return True

    def _case(self) -> int:
        progress = self.scratch / "progress"
        return int.from_bytes(progress.read_bytes(), "little") if progress.exists() and progress.stat().st_size else -1

    def outcomes(self) -> list[tuple[int, str]]:
        path = self.scratch / "outcomes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [*((case, outcome) for case, outcome in map(json.loads, lines)), *self.lost]


def fuzz(first: int, cases: int, processes: int, folder: Path) -> list[tuple[int, str]]:
    """Run cases in processes of their own; returns the outcome of each."""
    if not (folder / "corpus").exists():
        build(folder / "corpus")
    stop = first + cases
    workers = [
        Worker(folder / "corpus", folder / f"worker{i}", range(first + i, stop, processes))
        for i in range(min(processes, cases))
    ]
    while sum(worker.poll() for worker in workers):
        time.sleep(0.1)
    return sorted(outcome for worker in workers for outcome in worker.outcomes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(arguments.first, arguments.cases, arguments.processes, Path(folder))
    fine = Counter(outcome for _, outcome in outcomes if outcome in ("used", "refused"))
    failed = [(case, outcome) for case, outcome in outcomes if outcome not in fine]
    for case, outcome in failed:
        print(f"case {case}: {outcome}")
    print(f"{len(outcomes)} cases: {fine['used']} used, {fine['refused']} refused, {len(failed)} failed")
    sys.exit(bool(failed) or len(outcomes) != arguments.cases)


if __name__ == "__main__":
    main()
