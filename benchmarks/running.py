"""What the benchmarks share: options, clocks, steps that take turns, and the file of results."""

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from narrowkv.evaluate.results import write_result

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}


def options(description: str | None, recipes: Iterable[str], repeats: int) -> argparse.ArgumentParser:
    """A parser of --json, --recipes and --repeats with these defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipes", nargs="+", default=list(recipes))
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser


def parse_with_clock(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for, --threads (a whole one) and --clock among it; sets the threads and the seed."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a machine in use")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    return arguments


def medians(steps: dict[str, Callable[[], Any]], repeats: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Median seconds of each step by a clock, all taking turns, in another order each time.

    A step finds in the caches what the one before has left, and behind one that reads much memory nothing.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in random.Random(repeat).sample(list(steps.items()), len(steps)):
            start = clock()
            step()
            if repeat:  # the first warms up
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def write(path: Path | None, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Write rows, and what holds for all of them, to a file of results, if one is asked for."""
    if path is not None:
        kind = Path(sys.argv[0]).stem
        arguments = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]  # not where folders are
        command = shlex.join(["python", "-m", f"benchmarks.{kind}", *arguments])
        write_result(path, kind, command, settings, rows)
