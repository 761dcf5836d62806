"""Places for outliers: which coefficients of a block stay exact when more of them would than its budget has bits for."""

import torch
from torch import Tensor

from narrowkv.codec.scheme_parts import BLOCK


def places_of_outliers(fraction: float, n: int) -> int:
    """How many outliers a head of n coefficients may have in a block."""
    return round(fraction * BLOCK * n)


def within_places(missed: Tensor, outside: Tensor, fraction: float, first: int = 0, held: Tensor | None = None) -> Tensor:
    """Which outliers get a slot: bool, shaped as missed [batch, kv_heads, tokens, n], what codes miss each coefficient by.

    In a block of 64 tokens a head has slots for this fraction of its coefficients, so that no text takes more bits than the
    budget has; tokens take them in turn, the dearest outliers of each first. first, held: as
    `TrellisQuantizer._encode` has them.
    """
    tokens, n = missed.shape[2:]
    wanted = outside.sum(-1)  # [batch, kv_heads, tokens]
    by_block = torch.nn.functional.pad(wanted, (first, -(first + tokens) % BLOCK)).unflatten(2, (-1, BLOCK))
    before = by_block.cumsum(-1) - by_block
    if held is not None:
        before[:, :, 0] += held[..., None]
    left = (places_of_outliers(fraction, n) - before).flatten(2)[:, :, first : first + tokens]
    allowed = outside & (left > 0)[..., None]
    partly = (left > 0) & (wanted > left)  # one token of a block and head at most, so that few are sorted
    rank = missed[partly].masked_fill(~outside[partly], -1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    allowed[partly] &= rank < left[partly][:, None]
    return allowed
