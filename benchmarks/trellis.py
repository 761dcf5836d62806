"""What encoding trellis-coded streams costs: `python -m benchmarks.trellis [--json FILE]`.

Microseconds for a head of 128 channels, Gaussian elements with a weight for each, by every kernel of this processor and by the
reference in plain torch, in the same run: all take turns, and medians are compared. Mixes have units of 8 channels of 0 to 6
bits.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.running import CLOCKS, medians, options, parse_with_clock, write
from narrowkv.codec.gaussian_tables import STEPS, gaussian_tables
from narrowkv.codec.trellis import GRID_STEP, KERNELS, UNIT, encode_compiled, encode_naive

ROWS = 256
MIXES = {f"all {rate}": [16 * (rate == k) for k in range(7)] for rate in range(1, 7)} | {
    "mix of 2": [2, 3, 6, 3, 2, 0, 0],
    "mix of 3": [1, 1, 3, 4, 6, 1, 0],
    "mix of 4": [0, 1, 1, 2, 7, 3, 2],
}


def main() -> None:
    arguments = parse_with_clock(options(__doc__, MIXES, repeats=20))
    tables, rows = gaussian_tables(), []
    for name in arguments.recipes:
        counts = MIXES[name]
        steps = torch.tensor([STEPS[rate - 1] for rate, units in enumerate(counts) if rate for _ in range(UNIT * units)])
        elements = (torch.randn(1, ROWS, len(steps)) / steps * GRID_STEP).clamp(-32768, 32767).to(torch.int16)
        weights = torch.randint(16384, 65536, (1, 1, len(steps)), dtype=torch.int32).to(torch.uint16)
        call = (elements, weights, counts, tables)
        kinds: dict[str, Callable[[], Any]] = {kernel: functools.partial(encode_compiled, *call, kernel) for kernel in KERNELS}
        kinds["torch"] = functools.partial(encode_naive, *call)
        found = medians(kinds, arguments.repeats, CLOCKS[arguments.clock])
        row = {"rates": name} | {f"microseconds_{kind}": 1e6 * seconds / ROWS for kind, seconds in found.items()}
        print(json.dumps(row), flush=True)
        rows.append(row)
    write(arguments.json, rows, clock=arguments.clock, threads=arguments.threads)


if __name__ == "__main__":
    main()
