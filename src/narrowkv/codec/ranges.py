"""Online ranges: what part of a vector's elements the codes must cover, and which elements lie outside."""

import torch
from torch import Tensor

from narrowkv.codec.cpu.encode import all_finite
from narrowkv.codec.scheme_parts import Strategy
from narrowkv.errors import ActivationError


def outliers_per_tail(size: int, fraction: float) -> int:
    """How many of `size` elements are outliers at each tail: the integer nearest to half the fraction."""
    return int(size * fraction / 2 + 0.5)


def as_vectors(x: Tensor, strategy: Strategy, group_size: int | None = None) -> Tensor:
    """Lay out x so that the last dimension holds the elements that share a range.

    x: [batch, kv_heads, tokens, head_dim]. Returns [batch, 1, tokens, 1, kv_heads * head_dim] for strategy `token`,
    [batch, kv_heads, tokens, 1 or head_dim / group, ...] for `token_head`, [batch, kv_heads, tokens / group, head_dim,
    group] for `channel`.
    """
    if strategy == "token":
        return x.transpose(1, 2).flatten(2)[:, None, :, None]
    if strategy == "channel":
        return x.unflatten(2, (-1, group_size or x.shape[2])).transpose(3, 4)
    return x.unflatten(3, (-1, group_size or x.shape[3]))


def broadcast_groups(part: Tensor, like: Tensor) -> Tensor:
    """Repeat the ranges of groups so that they broadcast: part [batch, heads, groups, groups or 1] against like's shape."""
    for dim in (2, 3):
        if part.shape[dim] not in (1, like.shape[dim]):
            part = part.repeat_interleave(like.shape[dim] // part.shape[dim], dim=dim)
    return part


def online_range(
    x: Tensor, strategy: Strategy, outliers: float, group_size: int | None = None, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each vector once its outliers are left out (KVQuant, section 3.4).

    x: [batch, kv_heads, tokens, head_dim] float32. skip: [batch, tokens] bool, tokens that a range over several tokens leaves
    out. Returns lower, upper: [batch, 1 or kv_heads, tokens or groups, 1, groups or head_dim] float32.
    """
    if strategy == "channel" and skip is not None and skip.any():
        low, high = (
            as_vectors(x.masked_fill(skip[:, None, :, None], fill), strategy, group_size) for fill in (torch.inf, -torch.inf)
        )
    else:
        low = high = as_vectors(x, strategy, group_size)
    count = outliers_per_tail(low.shape[-1], outliers)
    if count:
        upper = high.topk(count + 1, dim=-1).values[..., -1]
        lower = low.topk(count + 1, dim=-1, largest=False).values[..., -1]
    else:
        lower, upper = low.amin(-1), high.amax(-1)
    nothing = ~(lower <= upper) | lower.isinf() | upper.isinf()  # of a group in which all tokens are left out
    return (lower.masked_fill(nothing, 0), upper.masked_fill(nothing, 0)) if nothing.any() else (lower, upper)


def to_scale_zero(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (half the range) and zero (its middle), so that (x - zero) / scale lies in [-1, 1]. Shapes unchanged."""
    return (upper - lower) / 2, (upper + lower) / 2


def require_finite(what: str, *tensors: Tensor) -> None:
    """Raise ActivationError if any number of these is NaN or infinite."""
    if not all_finite(*tensors):
        raise ActivationError(
            f"{what} contain NaN or infinity; check the model's weights and dtype (float16 overflows, bfloat16 does not)."
        )


def to_16_bits(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Round to a 16-bit dtype; raises ActivationError where the element does not fit."""
    rounded = x.to(dtype)
    if not torch.isfinite(rounded).all():
        name = str(dtype).removeprefix("torch.")
        raise ActivationError(
            f"{what} exceed the range of {name}, in which they are stored (largest {x.abs().max().item():.3g}); use recipe "
            f"fp16."
        )
    return rounded
