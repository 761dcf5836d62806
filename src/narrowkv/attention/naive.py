"""Attention as it is defined: dequantize everything, rotate, softmax. Obviously right: what the other backends are tested
against.

It computes in float32, or in float64 for queries in float64.
"""

import torch
from torch import Tensor

from narrowkv.attention.mask import AttentionMask
from narrowkv.attention.rope import AnyRope
from narrowkv.store import LayerStore


def attend(
    query: Tensor,
    store: LayerStore,
    *,
    past: int,
    new: tuple[Tensor, Tensor] | None,
    rope: AnyRope | None,
    rope_state: Tensor | None,
    mask: AttentionMask,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the newest queries over the packed cache.

    query: [batch, query_heads, queries, head_dim], already rotated; the last query is the last token of the sequence.
    past: tokens before this one are read from the packed form. new: exact keys (rotated) and values that follow them,
    [batch, kv_heads, n, head_dim] each, or None. rope: rotates the stored keys, None where they were stored rotated;
    rope_state: what it needs of each token that is held, [batch, past - store.first, ...]. mask: which tokens a query sees.
    scaling: factor on the scores. softcap: scores s become softcap * tanh(s / softcap). sink_logits: [query_heads], a score of
    each head that takes part in the softmax and has no value (GPT-OSS).
    Returns [batch, query_heads, queries, head_dim] float32 (or float64); a query that sees nothing yields zeros.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    parts = []
    if past > store.first:
        keys, values = (part.to(precision) for part in store.read(past))
        if rope is not None and rope_state is not None:
            keys = rope.rotate(keys, rope_state)
        parts.append((keys, values))
    if new:
        parts.append(new)
    keys, values = (torch.cat([x.to(precision) for x in side], dim=2) for side in zip(*parts, strict=True))
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    key_index = torch.arange(keys.shape[2], device=query.device, dtype=torch.int64) + store.first
    scores = query.to(precision) * scaling @ keys.transpose(2, 3)  # [batch, query_heads, queries, tokens]
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    hidden = mask.hidden(key_index[len(key_index) - query.shape[2] :], key_index)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sink_logits is not None:
        sinks = sink_logits.to(precision)[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return weights @ values
