"""Torch's fused attention over a split of keys, by operators that return the sum of each softmax too, so splits can be merged.

Which operator, by where the queries are:

- on a CPU, `_scaled_dot_product_flash_attention_for_cpu`, of any dtype;
- on a GPU, for 16 bits, `_scaled_dot_product_flash_attention` where a query sees all keys, or those up to itself;
- on a GPU, for 16 bits, `_scaled_dot_product_efficient_attention` where a mask says what a query sees, and where torch says
  that its flash attention does not run: heads of more than 256 channels, cards older than Ampere.

On a GPU there is none for 32 bits that uses its matrix units as exactly as `softmax.OnlineSoftmax` does.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

HALVES = (torch.float16, torch.bfloat16)
MASK_ALIGNMENT = 8  # elements of a mask, from one row to the next


def device_for(query: Tensor) -> Literal["cpu", "gpu"] | None:
    """Where such queries [batch, query_heads, queries, head_dim] find an operator; None if they do not."""
    if query.device.type == "cpu":
        return "cpu"
    if query.device.type != "cuda" or query.dtype not in HALVES:
        return None
    runs = flash_reads(query, query) or can_use_efficient_attention(_parameters(query, query))
    return "gpu" if runs else None


def flash_reads(query: Tensor, keys: Tensor) -> bool:
    """Whether torch's flash attention runs on a GPU for such queries and keys, of which there may be fewer heads."""
    return query.shape[3] % 8 == 0 and bool(can_use_flash_attention(_parameters(query, keys)))


def _parameters(query: Tensor, keys: Tensor) -> SDPAParams:
    return SDPAParams(query, keys, keys, None, 0.0, False, query.shape[1] != keys.shape[1])


def operator(name: str) -> Any:
    """An operator of torch."""
    return getattr(torch.ops.aten, name)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, causal: bool, hidden: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention over keys and values [batch, kv_heads, n, head_dim], channels side by side, and logs of its softmax's sums.

    query: [batch, query_heads, queries, head_dim]. causal: query i sees keys 0 to i, of as many; else it sees those that are
    not hidden, [batch or 1, 1, queries, n] bool. Returns [batch, query_heads, queries, head_dim] in the dtype of the queries
    and [batch, query_heads, queries] float32 or float64, -inf for a query that sees nothing.
    """
    device = device_for(query)
    if device == "cpu":
        mean, lse = _on_cpu(query, keys, values, causal, None if hidden is None else _mask(query, hidden), scaling)
    elif hidden is None and flash_reads(query, keys):
        mean, lse = _flash(query, keys, values, causal, scaling)
    else:
        mean, lse = _efficient(query, keys, values, causal, None if hidden is None else _mask(query, hidden), scaling)
    return mean, lse if hidden is None else lse.masked_fill(hidden.all(-1), -torch.inf)


def _mask(query: Tensor, hidden: Tensor) -> Tensor:
    """What is added to scores, [batch or 1, 1, queries, n]: finite, so that a query that sees nothing yields elements too."""
    keys = hidden.shape[3]
    padded = query.new_zeros(*hidden.shape[:3], -(-keys // MASK_ALIGNMENT) * MASK_ALIGNMENT)
    return padded[..., :keys].masked_fill_(hidden, torch.finfo(query.dtype).min)


def _on_cpu(
    query: Tensor, keys: Tensor, values: Tensor, causal: bool, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    found = operator("_scaled_dot_product_flash_attention_for_cpu")(
        query, keys, values, is_causal=causal, attn_mask=mask, scale=scaling
    )
    return found[0], found[1]


def _flash(query: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """It reads a KV head for each of its group. Causal means up to the last key for the last query, so as many of both."""
    found = operator("_scaled_dot_product_flash_attention")(query, keys, values, 0.0, causal, False, scale=scaling)
    return found[0], found[1]


def _efficient(
    query: Tensor, keys: Tensor, values: Tensor, causal: bool, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """It wants as many heads of all, a mask for each head, and tells more sums than there are queries."""
    batch, heads, queries = query.shape[:3]
    keys, values = (side.repeat_interleave(heads // side.shape[1], dim=1) for side in (keys, values))
    mask = None if mask is None else mask.expand(batch, heads, -1, -1)
    found = operator("_scaled_dot_product_efficient_attention")(query, keys, values, mask, True, 0.0, causal, scale=scaling)
    return found[0], found[1][:, :, :queries]
