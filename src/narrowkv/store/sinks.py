"""Sinks: the first real tokens of each sequence, which stay exact beside the codes."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from narrowkv.store.layer import LayerStore

Places = tuple[Tensor, Tensor, Tensor]


def find_sinks(skip: Tensor, index: Tensor | None, count: int) -> Places:
    """Row, token and place of the sinks among new tokens, which are then skipped too.

    skip: [batch, new] bool, padding; changed in place. index: [batch, count] int64, the sinks seen before, -1 where there are
    none; None before the first tokens.
    """
    have = skip.new_zeros(len(skip), dtype=torch.int64) if index is None else (index >= 0).sum(1)
    rank = have[:, None] + (~skip).cumsum(1) - 1  # of each real token within its sequence
    row, token = ((rank < count) & ~skip & (have < count)[:, None]).nonzero(as_tuple=True)
    skip[row, token] = True
    return row, token, rank[row, token]


def take_sinks(
    store: "LayerStore", keys: Tensor, values: Tensor, before: int, row: Tensor, token: Tensor, place: Tensor
) -> None:
    """Keep the sinks among new tokens, which follow `before` others."""
    batch, heads, _, dim = keys.shape
    if store.sink_index is None:
        store.sink_index = torch.full((batch, store.sinks), -1, dtype=torch.int64, device=keys.device)
        blank = (batch, heads, store.sinks, dim)
        store.sink_numbers = (keys.new_zeros(blank), values.new_zeros(blank))
    assert store.sink_numbers is not None
    store.sink_index[row, place] = token + before
    for held, numbers in zip(store.sink_numbers, (keys, values), strict=True):
        held[row, :, place] = numbers[row, :, token]


def put_sinks(start: int, pair: tuple[Tensor, Tensor], index: Tensor, held: tuple[Tensor, Tensor]) -> None:
    """Put sinks in place among decoded tokens, the first of which is the token `start`.

    pair: keys and values [batch, kv_heads, tokens, head_dim]. index: [batch, sinks]; held: [batch, kv_heads, sinks, head_dim].
    """
    inside = (index >= start) & (index < start + pair[0].shape[2])
    row, place = inside.nonzero(as_tuple=True)
    token = index[row, place] - start
    for numbers, exact in zip(pair, held, strict=True):
        numbers[row, :, token] = exact[row, :, place].to(numbers.dtype)
