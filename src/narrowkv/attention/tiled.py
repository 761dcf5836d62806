"""Attention in plain torch, tile by tile: decode a piece of the cache, attend to it, forget it. Runs on any device.

The softmax is carried from tile to tile (its largest score and its sums so far), so that the memory needed does not grow with
the length of the cache. Computes in float32, or in float64 for queries in float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from narrowkv.attention.rope import AnyRope
from narrowkv.attention.visible import Visible
from narrowkv.store import LayerStore

QUERY_SLICE = 128  # queries at a time, which bounds the memory of the scores
KEY_SLICE = 512  # exact keys at a time


def attend(
    query: Tensor,
    store: LayerStore,
    *,
    past: int,
    new: tuple[Tensor, Tensor] | None,
    rope: AnyRope | None,
    kept: Tensor | None,
    visible: Visible,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the newest queries over the packed cache; parameters and result as of `naive.attend`."""
    precision = torch.promote_types(query.dtype, torch.float32)
    query, queries = query.to(precision) * scaling, query.shape[2]
    length = past + (new[0].shape[2] if new else 0)
    softmax = [
        _RunningSoftmax(query[:, :, row : row + QUERY_SLICE], sink_logits, softcap) for row in range(0, queries, QUERY_SLICE)
    ]
    index = torch.arange(store.first, length, device=query.device)
    for start, keys, values in _tiles(store, past, new, rope, kept, precision):
        for i, part in enumerate(softmax):
            first = length - queries + i * QUERY_SLICE
            asking = range(first, first + part.queries)
            if seen := visible.within(range(start, start + keys.shape[2]), asking):
                query_index, key_index = (index[some.start - store.first : some.stop - store.first] for some in (asking, seen))
                near = slice(seen.start - start, seen.stop - start)
                part.see(keys[:, :, near], values[:, :, near], visible.hidden(query_index, key_index))
    return torch.cat([part.result() for part in softmax], dim=2)


def _tiles(
    store: LayerStore,
    past: int,
    new: tuple[Tensor, Tensor] | None,
    rope: AnyRope | None,
    kept: Tensor | None,
    precision: torch.dtype,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index of the first token, rotated keys, values) of what is stored and of what is new."""
    for start, keys, values in store.tiles(past):
        keys = keys.to(precision)
        if rope is not None and kept is not None:
            first = start - store.first
            keys = rope.rotate(keys, kept[:, first : first + keys.shape[2]])
        yield start, keys, values.to(precision)
    if new:
        for start in range(0, new[0].shape[2], KEY_SLICE):
            keys, values = (part[:, :, start : start + KEY_SLICE].to(precision) for part in new)
            yield past + start, keys, values


class _RunningSoftmax:
    """Some queries on their way along the keys: the largest score so far, the sum of weights, the weighted sum of values."""

    def __init__(self, query: Tensor, sink_logits: Tensor | None, softcap: float | None):
        """query: [batch, query_heads, queries, head_dim], scaled."""
        self.query = query
        self.queries = query.shape[2]
        self.softcap = softcap
        self.largest = query.new_full((*query.shape[:3], 1), -torch.inf)
        self.total = torch.zeros_like(self.largest)
        self.mixed = torch.zeros_like(query)
        if sink_logits is not None:
            self.largest = sink_logits.to(query.dtype)[None, :, None, None].expand_as(self.largest)
            self.total = torch.ones_like(self.largest)

    def see(self, keys: Tensor, values: Tensor, hidden: Tensor) -> None:
        """keys, values: [batch, kv_heads, tokens, head_dim]. hidden: [batch or 1, 1, queries, tokens]."""
        batch, heads, _, dim = keys.shape
        grouped = self.query.reshape(batch, heads, -1, dim)  # [batch, kv_heads, group * queries, head_dim]
        scores = (grouped @ keys.transpose(2, 3)).view(batch, -1, self.queries, keys.shape[2])
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        scores = scores.masked_fill_(hidden, -torch.inf)
        largest = torch.maximum(self.largest, scores.amax(-1, keepdim=True))
        reference = largest.masked_fill(largest.isinf(), 0.0)  # of a query that has seen nothing yet
        weights = scores.sub_(reference).exp_()
        fading = (self.largest - reference).exp_()
        self.total = self.total * fading + weights.sum(-1, keepdim=True)
        mixed = weights.view(batch, heads, -1, keys.shape[2]) @ values
        self.mixed = self.mixed * fading + mixed.view_as(self.mixed)
        self.largest = largest

    def result(self) -> Tensor:
        """[batch, query_heads, queries, head_dim]; zeros for a query that has seen nothing."""
        return self.mixed / self.total.masked_fill(self.total == 0, 1.0)
