"""The budget of outliers: which coefficients of a block stay exact when more of them would than its budget has bits for."""

import torch
from torch import Tensor

from narrowkv.codec.scheme_parts import BLOCK


def block_budget(fraction: float, n: int) -> int:
    """How many outliers a head of n coefficients may have in a block."""
    return round(fraction * BLOCK * n)


def within_budget(missed: Tensor, outside: Tensor, fraction: float, first: int = 0, earlier: Tensor | None = None) -> Tensor:
    """Which outliers the budget has space for: bool, [batch, kv_heads, tokens, n].

    missed: of the same shape, what codes miss each coefficient by. In a block of 64 tokens a head may have outliers of this
    fraction of its coefficients, so that no text takes more bits than the budget has; tokens take from it in turn, the dearest
    outliers of each first. first, earlier: as `TrellisQuantizer._encode` has them.
    """
    tokens, n = missed.shape[2:]
    wanted = outside.sum(-1)  # [batch, kv_heads, tokens]
    by_block = torch.nn.functional.pad(wanted, (first, -(first + tokens) % BLOCK)).unflatten(2, (-1, BLOCK))
    before = by_block.cumsum(-1) - by_block
    if earlier is not None:
        before[:, :, 0] += earlier[..., None]
    left = (block_budget(fraction, n) - before).flatten(2)[:, :, first : first + tokens]
    allowed = outside & (left > 0)[..., None]
    partly = (left > 0) & (wanted > left)  # one token of a block and head at most, so that few are sorted
    rank = missed[partly].masked_fill(~outside[partly], -1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    allowed[partly] &= rank < left[partly][:, None]
    return allowed
