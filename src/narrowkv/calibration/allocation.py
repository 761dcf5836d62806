"""Mixed precision: which scheme for the keys and for the values of each layer, under a budget for the whole cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from narrowkv.calibration.samples import Samples
from narrowkv.codec import AnyQuantizer, Scheme
from narrowkv.defaults import REFERENCE_TOKENS
from narrowkv.errors import RecipeError
from narrowkv.store.page import BLOCK, PackedSide, to_blocks

CELLS = 2**16  # steps into which a budget is divided


@dataclass(frozen=True)
class Option:
    """One way to keep the keys, or the values, of one layer.

    bits: what it takes for each token, tables included, over as many tokens as layers hold of 32,768 on average. cost: loss
        predicted, in nats for each token of text.
    """

    scheme: Scheme
    bits: float
    cost: float


def measure(quantizer: AnyQuantizer, samples: Samples, keys: bool, tokens: float = REFERENCE_TOKENS) -> Option:
    """What a quantizer takes and costs, found by storing a sample as a cache would; tokens: over which
    tables are counted.
    """
    numbers = samples.heads()[:, :, : 16 * BLOCK]
    numbers = numbers.repeat(1, 1, -(-BLOCK // numbers.shape[2]), 1) if numbers.shape[2] < BLOCK else numbers
    return Option(quantizer.scheme, stored_bits(quantizer, numbers, keys, tokens), samples.cost(quantizer))


def stored_bits(quantizer: AnyQuantizer, numbers: Tensor, keys: bool, tokens: float = REFERENCE_TOKENS) -> float:
    """Bits that a store takes for each token of `numbers` [batch, kv_heads, tokens, head_dim], of which whole blocks are
    stored; tables are counted over `tokens`.
    """
    whole = numbers.shape[2] // BLOCK * BLOCK
    blocks = to_blocks(quantizer.encode(numbers[:, :, :whole]))
    found = 0 if blocks.outlier_index is None else len(blocks.outlier_index)
    side = PackedSide.allocate(quantizer, whole // BLOCK, blocks, keys=keys, outlier_room=found)
    held = [*side.planes, *side.outliers(), *side.ranges.values()]
    tables = sum(table.nbytes for table in quantizer.tensors().values())
    return 8 * (sum(tensor.nbytes for tensor in held) / whole + tables / tokens)


def allocate(menus: Sequence[Sequence[Option]], budget: float, numbers: int = 1, beside: float = 0.0) -> list[int]:
    """Which option of each menu to take so that the sum of costs is least and that of bits at most `budget` for each number.

    numbers: of a token, in all layers. beside: bits for each number that are taken anyway. Exact, by dynamic
    programming over the budget in 65,536 steps, to which bits are rounded up. Raises RecipeError where even the smallest
    options exceed it.
    """
    room = (budget - beside) * numbers
    least = sum(min(option.bits for option in menu) for menu in menus)
    sizes = [np.ceil(np.array([option.bits for option in menu]) * (CELLS / room)).astype(np.int64) for menu in menus]
    if room <= 0 or sum(int(size.min()) for size in sizes) > CELLS:
        raise RecipeError(
            f"a budget of {budget:g} bits is too small for this model, on which {least / numbers + beside:.3f} is the least; "
            "allow more."
        )
    best = np.zeros(CELLS + 1)  # least cost of the menus so far that fit into so many cells
    taken = []
    for menu, size in zip(menus, sizes, strict=True):
        totals = np.full((len(menu), CELLS + 1), np.inf)
        for option, cells, total in zip(menu, size, totals, strict=True):
            if cells <= CELLS:
                total[cells:] = best[: CELLS + 1 - cells] + option.cost
        taken.append(totals.argmin(0))
        best = totals.min(0)
    picks, room = [], CELLS
    for choice, size in zip(reversed(taken), reversed(sizes), strict=True):
        picks.append(int(choice[room]))
        room -= int(size[picks[-1]])
    return picks[::-1]
