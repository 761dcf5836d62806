"""Attention in plain torch: decode everything, rotate, softmax. Slow and obviously right: what kernels are tested against.

It computes in float32, or in float64 for queries in float64.
"""

import torch
from torch import Tensor

from narrowkv.attention.rope import Rope
from narrowkv.store import LayerStore

QUERY_SLICE = 256  # queries at a time, which bounds the memory of the scores


def attend(
    query: Tensor,
    store: LayerStore,
    *,
    past: int,
    new: tuple[Tensor, Tensor] | None,
    rope: Rope | None,
    positions: Tensor,
    padding: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest queries over the packed cache.

    query: [batch, query_heads, queries, head_dim], already rotated; the last query is the last token of the sequence.
    past: how many stored tokens are read from the packed form. new: exact keys (rotated) and values that follow them,
    [batch, kv_heads, n, head_dim] each, or None. rope: rotates the stored keys, None where they were stored rotated.
    positions: [batch, past] of the stored tokens. padding: [batch, past + n] bool, False where a token must not be seen.
    scaling: factor on the scores. sliding_window: a query sees only that many of the newest tokens, itself included.
    softcap: scores s become softcap * tanh(s / softcap). sink_logits: [query_heads], a score of each head that takes part in
    the softmax and has no value (GPT-OSS).
    Returns [batch, query_heads, queries, head_dim] float32 (or float64); a query that sees nothing yields zeros.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    parts = []
    if past:
        keys, values = (part.to(precision) for part in store.read(past))
        parts.append((rope.rotate(keys, positions) if rope else keys, values))
    if new:
        parts.append(new)
    keys, values = (torch.cat([x.to(precision) for x in side], dim=2) for side in zip(*parts, strict=True))
    batch, query_heads, queries, dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    key_index = torch.arange(length, device=query.device)
    outputs = []
    for start in range(0, queries, QUERY_SLICE):
        rows = query[:, :, start : start + QUERY_SLICE].to(precision) * scaling
        query_index = key_index[length - queries + start :][: rows.shape[2], None]  # [rows, 1]
        seen = length - queries + start + rows.shape[2]  # no query of this slice sees further
        hidden = key_index[:seen] > query_index  # [rows, seen]
        if sliding_window is not None:
            hidden = hidden | (key_index[:seen] <= query_index - sliding_window)
        if padding is not None:
            hidden = hidden | ~padding[:, None, None, None, :seen]
        grouped = rows.reshape(batch, kv_heads, -1, dim)  # [batch, kv_heads, group * rows, head_dim]
        scores = (grouped @ keys[:, :, :seen].transpose(2, 3)).unflatten(2, (-1, rows.shape[2]))
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        scores = scores.masked_fill(hidden, -torch.inf)
        if sink_logits is None:
            weights = scores.softmax(-1)
        else:
            sinks = sink_logits.to(precision).view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        if padding is not None:
            weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)
        outputs.append((weights.flatten(2, 3) @ values[:, :, :seen]).view(batch, query_heads, -1, dim))
    return torch.cat(outputs, dim=2)
