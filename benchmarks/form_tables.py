"""Tables of the trellis-coded form, and the search for the best path through them: parts of `benchmarks.forms`.

An element with a rate of k bits decodes to tables[k][state], where the state is the last `state_bits` bits of the token's
stream up to and including its own k. Trellis-coded quantization: Marcellin and Fischer 1990; with a sliding window of bits as
state: QTIP (arXiv 2406.11235).
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from narrowkv.calibration import trellis_tables
from narrowkv.codec.trellis import NIBBLE

RATES = 7  # 0 to 6 bits
LEARNED_ON, SETTLED = (1000, 64), 8  # Gaussian elements for learning; the first few see only some of the states


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).parent / "forms" / "viterbi.cpp"
    folder = tempfile.mkdtemp()
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", f"{folder}/viterbi.so"], check=True)
    return ctypes.CDLL(f"{folder}/viterbi.so")


def viterbi(elements: Tensor, weights: Tensor, rates: Sequence[int], tables: Tensor) -> Tensor:
    """States after each element on the path of least weighted squared error.

    elements, weights: [tokens, n] float32. rates: n elements of bits, 1 to 6. tables: [7, states] float32. Returns [tokens, n]
    int64.
    """
    elements, weights = elements.float().contiguous(), weights.float().contiguous()
    bits = torch.tensor(rates, dtype=torch.int32)
    states = torch.empty(elements.shape, dtype=torch.int32)
    pointers = [ctypes.c_void_p(part.data_ptr()) for part in (elements, weights, bits, tables, states)]
    tokens, count = (ctypes.c_int64(size) for size in elements.shape)
    _library().viterbi(*pointers[:4], tokens, count, (tables.shape[1] - 1).bit_length(), pointers[4])
    return states.long()


def additive(table: Tensor, counts: Tensor) -> Tensor:
    """The nearest table of the form A[high nibble] + B[low nibble]; table, counts (what each entry weighs): [256]."""
    high, low = trellis_tables.additive(table, counts)
    return (high[:, None] + low).flatten()


def on_grid(table: Tensor, bits: int, form: str) -> Tensor:
    """The table in whole steps of its largest entry / (2^(bits - 1) - 1); both parts of an additive one."""
    top = (1 << (bits - 1)) - 1
    step = table.abs().max() / top
    if form == "full":
        return (table / step).round() * step
    high = table.view(NIBBLE, NIBBLE).mean(1)
    low = table.view(NIBBLE, NIBBLE)[0] - high[0]
    return ((high / step).round()[:, None] + (low / step).round()).clamp(-top, top).flatten() * step


def learned(table: Tensor, states: Tensor, elements: Tensor, weights: Tensor, form: str) -> Tensor:
    """One step of Lloyd's: entries move to the weighted means of what fell to them; states, elements, weights: [n]."""
    counts = torch.bincount(states, weights=weights, minlength=len(table)).float()
    sums = torch.bincount(states, weights=elements * weights, minlength=len(table)).float()
    prior = 2e-3 * counts.sum() / len(table)  # an entry that nothing falls to stays where it is
    means = (sums + prior * table) / (counts + prior)
    return means if form == "full" else additive(means, counts + prior)


def quantiles(states: int, seed: int) -> Tensor:
    """Quantiles of a Gaussian in random order: neighboring states decode to unrelated elements."""
    order = torch.randperm(states, generator=torch.Generator().manual_seed(seed))
    return torch.special.ndtri((torch.arange(states) + 0.5) / states).float()[order]


def dithered(rate: int, seed: int) -> Tensor:
    """A uniform scalar code in an element's own bits, shifted by the older bits of the state; [256]."""
    step = (1.6, 0.9957, 0.586, 0.3352, 0.1881, 0.1041)[rate - 1]  # of the best uniform code for a Gaussian
    state, older = torch.arange(256), 256 >> rate
    order = torch.randperm(older, generator=torch.Generator().manual_seed(seed))
    own = (state & ((1 << rate) - 1)).float() - (2**rate - 1) / 2
    return step * (own + 2 * ((order[state >> rate].float() + 0.5) / older - 0.5))


@functools.cache
def gaussian(state_bits: int, form: str, seeds: int = 4) -> tuple[Tensor, Tensor]:
    """Tables [7, states] learned on a unit Gaussian, the best of several starts, and the squared error of each rate [7]."""
    states = 1 << state_bits
    tables, errors = torch.zeros(RATES, states), torch.ones(RATES, dtype=torch.float64)
    for rate in range(1, min(RATES - 1, state_bits) + 1):
        starts = [quantiles(states, seed) for seed in range(seeds)]
        if states == 256:
            starts += [dithered(rate, seed) for seed in range(seeds)]
        found = [_settle(rate, additive(start, torch.ones(states)) if form == "additive" else start, form) for start in starts]
        errors[rate], tables[rate] = min(found, key=lambda pair: pair[0])
    return tables, errors


def _settle(rate: int, table: Tensor, form: str) -> tuple[float, Tensor]:
    """A table after rounds of learning, the best of them, and its squared error."""
    tables = torch.zeros(RATES, len(table))
    tables[rate] = table
    generator = torch.Generator().manual_seed(rate)
    best = (float("inf"), table)
    for _ in range(30):
        elements = torch.randn(LEARNED_ON, generator=generator)
        states = viterbi(elements, torch.ones_like(elements), [rate] * LEARNED_ON[1], tables)[:, SETTLED:].flatten()
        rope_state = elements[:, SETTLED:].flatten()
        error = (tables[rate][states] - rope_state).square().mean().item()
        best = min(best, (error, tables[rate].clone()), key=lambda pair: pair[0])
        tables[rate] = learned(tables[rate], states, rope_state, torch.ones_like(rope_state), form)
    return best
