"""Online ranges: what part of a vector's numbers the codes must cover, and which numbers lie outside."""

import torch
from torch import Tensor

from narrowkv.codec.scheme import Axis
from narrowkv.errors import ActivationError


def outliers_per_tail(size: int, fraction: float) -> int:
    """How many of `size` numbers are outliers at each tail: the whole number nearest to half the fraction."""
    return int(size * fraction / 2 + 0.5)


def as_vectors(x: Tensor, axis: Axis) -> Tensor:
    """Lay out x so that the last dimension holds the numbers that share a range.

    x: [batch, kv_heads, tokens, head_dim]. Returns [batch, tokens, kv_heads * head_dim] for axis `token`,
    [batch, kv_heads, tokens, head_dim] for `token_head`.
    """
    return x.transpose(1, 2).flatten(2) if axis == "token" else x


def online_range(x: Tensor, axis: Axis, outliers: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each vector once its outliers are left out (KVQuant, section 3.4).

    x: [batch, kv_heads, tokens, head_dim] float32.
    Returns lower, upper: [batch, 1 or kv_heads, tokens, 1] float32.
    """
    vectors = as_vectors(x, axis)
    count = outliers_per_tail(vectors.shape[-1], outliers)
    if count:
        upper = vectors.topk(count + 1, dim=-1).values[..., -1:]
        lower = vectors.topk(count + 1, dim=-1, largest=False).values[..., -1:]
    else:
        lower, upper = vectors.amin(-1, keepdim=True), vectors.amax(-1, keepdim=True)
    return (lower[:, None], upper[:, None]) if axis == "token" else (lower, upper)


def to_scale_zero(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (half the range) and zero (its middle), so that (x - zero) / scale lies in [-1, 1]. Shapes unchanged."""
    return (upper - lower) / 2, (upper + lower) / 2


def require_finite(x: Tensor, what: str) -> None:
    """Raise ActivationError if any number is NaN or infinite; one pass, since both ends show either."""
    if x.numel() and not torch.stack(torch.aminmax(x)).isfinite().all():
        raise ActivationError(
            f"{what} contain NaN or infinity; check the model's weights and dtype (float16 overflows, bfloat16 does not)."
        )


def to_16_bits(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Round to a 16-bit dtype; raises ActivationError where the number does not fit."""
    rounded = x.to(dtype)
    if not torch.isfinite(rounded).all():
        name = str(dtype).removeprefix("torch.")
        raise ActivationError(
            f"{what} exceed the range of {name}, in which they are kept (largest {x.abs().max().item():.3g}); use recipe fp16."
        )
    return rounded
