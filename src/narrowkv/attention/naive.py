"""Attention as it is defined: dequantize everything, rotate, softmax. Obviously right: what the other backends are tested
against.

It computes in float32, or in float64 for queries in float64.
"""

import torch
from torch import Tensor

from narrowkv.attention.inputs import AttentionInputs, Stored


def attend(inputs: AttentionInputs, store: Stored) -> Tensor:
    """Attention of the newest queries over the packed cache.

    Returns [batch, query_heads, queries, head_dim] float32 (or float64); a query that sees nothing yields zeros.
    """
    precision = inputs.precision
    parts = []
    if inputs.past > store.first:
        keys, values = (part.to(precision) for part in store.read(inputs.past))
        parts.append((inputs.rotate(keys, 0), values))
    if inputs.new:
        parts.append(inputs.new)
    keys, values = (torch.cat([x.to(precision) for x in side], dim=2) for side in zip(*parts, strict=True))
    group = inputs.query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = inputs.query.to(precision) * inputs.scaling @ keys.transpose(2, 3)  # [batch, query_heads, queries, tokens]
    if inputs.softcap is not None:
        scores = (scores / inputs.softcap).tanh() * inputs.softcap
    hidden = inputs.hidden(store.first)
    scores = scores.masked_fill(hidden, -torch.inf)
    if inputs.sink_logits is not None:
        sinks = inputs.sink_logits.to(precision)[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return weights @ values
