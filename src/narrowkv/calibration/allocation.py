"""Mixed precision: which scheme for the keys and for the values of each layer, under a budget for the whole cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from narrowkv.calibration.samples import Samples, in_whole_groups
from narrowkv.codec import AnyQuantizer, Scheme
from narrowkv.defaults import REFERENCE_TOKENS
from narrowkv.errors import RecipeError
from narrowkv.store.page import BLOCK, PackedTensor, to_blocks

CELLS = 2**16  # steps into which a budget is divided


@dataclass(frozen=True)
class Option:
    """One way to keep the keys, or the values, of one layer.

    bits: what it takes for each token, tables included, over the number of tokens, of 32,768, that layers store on average.
    cost: loss predicted, in nats for each token of text.
    """

    scheme: Scheme
    bits: float
    cost: float


def measure(quantizer: AnyQuantizer, samples: Samples, keys: bool, tokens: float = REFERENCE_TOKENS) -> Option:
    """What a quantizer takes and costs, found by storing a sample as a cache would; tokens: over which
    tables are counted.
    """
    elements = in_whole_groups(samples.heads()[:, :, : 16 * BLOCK], BLOCK)
    return Option(quantizer.scheme, stored_bits(quantizer, elements, keys, tokens), samples.cost(quantizer))


def stored_bits(quantizer: AnyQuantizer, elements: Tensor, keys: bool, tokens: float = REFERENCE_TOKENS) -> float:
    """Bits that a store takes for each token of `elements` [batch, kv_heads, tokens, head_dim], of which whole blocks are
    stored; tables are counted over `tokens`.
    """
    whole = elements.shape[2] // BLOCK * BLOCK
    blocks = to_blocks(quantizer.encode(elements[:, :, :whole]))
    found = 0 if blocks.outlier_index is None else len(blocks.outlier_index)
    side = PackedTensor.allocate(quantizer, whole // BLOCK, blocks, keys=keys, outlier_capacity=found)
    stored = [*side.planes, *side.outliers(), *side.ranges.values()]
    tables = sum(table.nbytes for table in quantizer.tensors().values())
    return 8 * (sum(tensor.nbytes for tensor in stored) / whole + tables / tokens)


def allocate(menus: Sequence[Sequence[Option]], budget: float, elements: int = 1, overhead: float = 0.0) -> list[int]:
    """Which option of each menu to take so that the sum of costs is least and that of bits at most `budget` per element.

    elements: of a token, in all layers. overhead: bits per element that are taken anyway. Exact, by dynamic
    programming over the budget in 65,536 steps, to which bits are rounded up. Raises RecipeError where even the smallest
    options exceed it.
    """
    capacity = (budget - overhead) * elements
    least = sum(min(option.bits for option in menu) for menu in menus)
    sizes = [np.ceil(np.array([option.bits for option in menu]) * (CELLS / capacity)).astype(np.int64) for menu in menus]
    if capacity <= 0 or sum(int(size.min()) for size in sizes) > CELLS:
        raise RecipeError(
            f"a budget of {budget:g} bits is too small for this model, on which {least / elements + overhead:.3f} is the "
            f"least; "
            "allow more."
        )
    best = np.zeros(CELLS + 1)  # least cost of the menus so far that fit into this many cells
    taken = []
    for menu, size in zip(menus, sizes, strict=True):
        totals = np.full((len(menu), CELLS + 1), np.inf)
        for option, cells, total in zip(menu, size, totals, strict=True):
            if cells <= CELLS:
                total[cells:] = best[: CELLS + 1 - cells] + option.cost
        taken.append(totals.argmin(0))
        best = totals.min(0)
    picks, capacity = [], CELLS
    for choice, size in zip(reversed(taken), reversed(sizes), strict=True):
        picks.append(int(choice[capacity]))
        capacity -= int(size[picks[-1]])
    return picks[::-1]
