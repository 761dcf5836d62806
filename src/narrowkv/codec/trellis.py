"""Trellis-coded codes: the elements of a row become one bit stream, of which each window of 8 bits names an entry of a table.

The last 8 bits of a row's stream are its state, at first 0. An element of rate k appends k bits, the highest first, and is
decoded to high[k][state >> 4] + low[k][state & 15] of the state that it leads to. Elements lie in ascending order of rate, 8
of one rate make a unit of k whole bytes, and nothing is stored of rate 0. cpp/trellis.h says in which integers the stream of
least cost is found. Trellis-coded quantization: Marcellin and Fischer 1990; with a window of bits as state: QTIP (arXiv
2406.11235).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.cuda.trellis import search
from narrowkv.codec.memory import address
from narrowkv.codec.scheme_parts import MOST_RATE, UNIT, stream_bytes
from narrowkv.errors import RecipeError

STATES = 256
NIBBLE = 16
GRID_STEP = 512  # of elements
TOP = 63  # magnitude of a table's entry
UNREACHED = 65535  # the highest cost
FEW = 64  # rows, for which a second thread is not worth the start
KERNELS = [name for name in ("avx512", "avx2") if name in _kernels.instruction_sets()] + ["generic"]


@dataclass(frozen=True)
class TrellisTables:
    """What codes of the rates 1 to 6 are decoded to, in grid steps.

    high, low: [6, 16] int8, by the upper and the lower 4 bits of the state. Raises RecipeError unless they are that, and no
    sum of both exceeds 63 in magnitude.
    """

    high: Tensor
    low: Tensor

    def __post_init__(self) -> None:
        for part in (self.high, self.low):
            if part.shape != (MOST_RATE, NIBBLE) or part.dtype != torch.int8:
                raise RecipeError(
                    f"Trellis tables are {MOST_RATE} x {NIBBLE} int8, not {list(part.shape)} {part.dtype}; calibrate again."
                )
        if self.entries().abs().max() > TOP:
            raise RecipeError(f"Entries of trellis tables exceed {TOP} grid steps in magnitude; calibrate again.")

    def entries(self) -> Tensor:
        """The entry of each state: [6, 256] int32."""
        return (self.high.int()[:, :, None] + self.low.int()[:, None]).flatten(1)


def encode(elements: Tensor, weights: Tensor, counts: Sequence[int], tables: TrellisTables) -> Tensor:
    """The bit stream of least weighted squared error of each row; compiled for the CPU, by Triton on a GPU.

    elements: [heads, rows, n] int16, in 1/512 of a grid step. weights: [heads, rows or 1, n] uint16, what a squared error
    costs: 0 where any is free, the largest near 65535, for costs are integers. counts: units of 8 elements of each rate
    from 0 to 6, those of rate 0 not in n. Returns [heads, rows, bytes] uint8. Raises RecipeError where these do not fit
    together.
    """
    _require_fit(elements, weights, counts, tables)
    if cuda.runs_on(elements.device):
        return search(elements, weights, counts, tables.entries() * GRID_STEP)
    if not elements.is_cpu:
        return encode_naive(elements, weights, counts, tables)
    return encode_compiled(elements, weights, counts, tables, KERNELS[0])


def encode_compiled(elements: Tensor, weights: Tensor, counts: Sequence[int], tables: TrellisTables, kernel: str) -> Tensor:
    """`encode` by one of KERNELS."""
    heads, rows, n = elements.shape
    codes = torch.empty(heads, rows, stream_bytes(counts), dtype=torch.uint8, device="cpu")
    parts = [part.contiguous() for part in (elements, weights, tables.high, tables.low)]
    nibbles = (MOST_RATE, NIBBLE)
    _kernels.encode_trellis(
        kernel,
        address(parts[0], torch.int16, shape=(heads, rows, n)),
        address(parts[1], torch.uint16, shape=(heads, weights.shape[1], n)),
        address(parts[2], torch.int8, shape=nibbles),
        address(parts[3], torch.int8, shape=nibbles),
        address(codes, torch.uint8),
        (heads, rows, weights.shape[1]),
        tuple(counts[1:]),
        1 if heads * rows <= FEW else torch.get_num_threads(),
    )
    return codes


def encode_naive(elements: Tensor, weights: Tensor, counts: Sequence[int], tables: TrellisTables) -> Tensor:
    """The same in plain torch, bit for bit."""
    rates, entries = rates_of(counts, elements.device).tolist(), tables.entries() * GRID_STEP
    costs = torch.full((*elements.shape[:2], STATES), UNREACHED, dtype=torch.int32, device=elements.device)
    costs[..., 0] = 0
    index = torch.arange(STATES, dtype=torch.int32, device=elements.device)
    predecessors, bits = [], 0
    for rate, element, weight in zip(rates, elements.int().unbind(-1), weights.int().unbind(-1), strict=True):
        groups = (costs * STATES + index).unflatten(-1, (1 << rate, -1))  # [heads, rows, predecessors, state >> rate]
        best = groups.amin(2)  # of equal costs the lowest predecessor
        predecessors.append(best % STATES)
        survived = best // STATES
        survived = (survived - survived.amin(-1, keepdim=True)).repeat_interleave(1 << rate, dim=-1)
        costs = (survived + _cost(element[..., None], weight[..., None], entries[rate - 1])).clamp(max=UNREACHED)
        bits += rate
        costs[..., 1 << bits :] = UNREACHED
    state = (costs * STATES + index).amin(-1) % STATES
    return _follow_back(state, predecessors, rates)


def _cost(element: Tensor, weight: Tensor, entries: Tensor) -> Tensor:
    """What each state's entry costs an element: [heads, rows, 256] int32."""
    distance = (element - entries).abs()
    square = (2 * distance).clamp(max=65535).long().square() >> 16
    return (square * weight >> 16).int()


def _follow_back(state: Tensor, predecessors: list[Tensor], rates: list[int]) -> Tensor:
    """The streams that end in these states: [heads, rows, bytes] uint8. state: [heads, rows]."""
    bits: list[Tensor] = []
    for rate, best in zip(reversed(rates), reversed(predecessors), strict=True):
        bits += [state >> i & 1 for i in range(rate)]
        state = best.gather(-1, (state >> rate).long()[..., None])[..., 0]
    if not bits:
        return torch.empty(*state.shape, 0, dtype=torch.uint8, device=state.device)
    shifts = torch.arange(7, -1, -1, dtype=torch.int32, device=state.device)
    return (torch.stack(bits[::-1], dim=-1).unflatten(-1, (-1, 8)) << shifts).sum(-1).to(torch.uint8)


def states(codes: Tensor, counts: Sequence[int]) -> Tensor:
    """The state that each element of streams leads to: [heads, rows, n] int64; codes: [heads, rows, bytes] uint8.

    Raises RecipeError where these do not fit together.
    """
    _require_counts(counts)
    if codes.dim() != 3 or codes.shape[2] != stream_bytes(counts) or codes.dtype != torch.uint8:
        raise RecipeError(
            f"Rates of {list(counts)} units take [heads, rows, {stream_bytes(counts)}] uint8, not {list(codes.shape)} "
            f"{codes.dtype}; use the counts that encoded them."
        )
    end = rates_of(counts, codes.device).cumsum(0)  # in bits
    padded = torch.nn.functional.pad(codes.long(), (1, 0))  # a byte of zeros before the first one
    last = (end - 1) // 8 + 1
    two = padded[..., last - 1] << 8 | padded[..., last]  # the 16 bits that end with the byte of an element's last bit
    return two >> (8 * last - end) & (STATES - 1)


def dequantize(codes: Tensor, counts: Sequence[int], levels: Tensor) -> Tensor:
    """The elements that streams stand for: [..., n] float32; compiled for the CPU, `dequantize_naive` elsewhere.

    codes: [..., bytes] uint8, what follows a row's stream is not read. levels: [6, 256] float32, of each rate and state.
    Raises RecipeError where these do not fit together.
    """
    _require_counts(counts)
    if not codes.is_cpu:
        return dequantize_naive(codes, counts, levels)
    if codes.shape[-1] < stream_bytes(counts) or tuple(levels.shape) != (MOST_RATE, STATES):
        raise RecipeError(
            f"Rates of {list(counts)} units take {stream_bytes(counts)} bytes, not {codes.shape[-1]}; use the counts that "
            "encoded them."
        )
    codes = codes.contiguous()
    elements = torch.empty(*codes.shape[:-1], UNIT * sum(counts[1:]), dtype=torch.float32, device="cpu")
    rows = codes[..., 0].numel() if codes.shape[-1] else 0
    _kernels.decode_streams(
        address(codes, torch.uint8),
        address(levels, torch.float32),
        address(elements, torch.float32),
        (rows, codes.shape[-1], elements.shape[-1]),
        tuple(counts[1:]),
        1 if rows <= FEW else torch.get_num_threads(),
    )
    return elements


def dequantize_naive(codes: Tensor, counts: Sequence[int], levels: Tensor) -> Tensor:
    """The same in plain torch, bit for bit."""
    stream = codes[..., : stream_bytes(counts)].flatten(0, -2)[None]
    found = levels[rates_of(counts, codes.device) - 1, states(stream, counts)]
    return found.view(*codes.shape[:-1], found.shape[-1])


def rates_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """The rate of each element that has codes: [n] int64."""
    rates = [rate for rate, count in enumerate(counts) if rate for _ in range(UNIT * count)]
    return torch.tensor(rates, dtype=torch.int64, device=device)


def _require_counts(counts: Sequence[int]) -> None:
    if len(counts) != MOST_RATE + 1 or min(counts) < 0:
        raise RecipeError(
            f"Rates of 0 to {MOST_RATE} bits need {MOST_RATE + 1} counts of units, not {list(counts)}; calibrate again."
        )


def _require_fit(elements: Tensor, weights: Tensor, counts: Sequence[int], tables: TrellisTables) -> None:
    _require_counts(counts)
    n = UNIT * sum(counts[1:])
    if elements.dim() != 3 or elements.shape[2] != n or elements.dtype != torch.int16:
        raise RecipeError(
            f"Rates of {list(counts)} units take [heads, rows, {n}] int16, not {list(elements.shape)} {elements.dtype}; "
            "leave out elements of rate 0, and fill units up."
        )
    heads, rows, _ = elements.shape
    if tuple(weights.shape) not in {(heads, rows, n), (heads, 1, n)} or weights.dtype != torch.uint16:
        raise RecipeError(
            f"Weights of {list(elements.shape)} elements are [{heads}, {rows} or 1, {n}] uint16, not {list(weights.shape)} "
            f"{weights.dtype}; give each element a weight."
        )
    if len({part.device for part in (elements, weights, tables.high, tables.low)}) > 1:
        raise RecipeError("Elements, weights and tables lie on different devices; move them to one.")
