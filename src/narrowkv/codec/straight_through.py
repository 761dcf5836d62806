"""The straight-through estimator: quantized elements whose gradient is, where codes reach, that of the elements themselves.

Rounding has no gradient of its own, so it is taken for the identity (Bengio et al., arXiv 1308.3432). Where a code saturates,
the element can move without the code following, and the gradient is zero:

- Static ranges: for an element outside its channel's range, unless it is an outlier, which is exact. Ranges taken online
  follow the elements, so none lies outside; but with learned thresholds, what a cap on outliers leaves behind does.
- Trellis-coded streams: for a coefficient beyond the outermost of the 256 entries of its rate, unless it is an outlier. One of
  rate 0 always saturates, since it is never read. A token's norm counts as a constant, and the factor by which dequantized
  coefficients are scaled up is left out. The gradient of channels is what passes, mapped to coefficients and back.
"""

from typing import Any

import torch
from torch import Tensor

from narrowkv.codec.quantizers.base import BaseQuantizer
from narrowkv.codec.quantizers.scalar import Quantizer
from narrowkv.codec.quantizers.trellis import TrellisQuantizer
from narrowkv.codec.trellis import TrellisTables

ROUNDING = 1e-5  # of half a range: its ends were elements once, and are rounded


def passing(quantizer: BaseQuantizer, x: Tensor, outliers: Tensor | None) -> Tensor:
    """A tensor whose gradient flows to x where codes reach, and nowhere else.

    x: [batch, kv_heads, tokens, head_dim] float32 or float64, from the first token of a block on. outliers: bool, which codes,
    or coefficients, [batch, kv_heads, tokens, positions] are exact; None where none are. Returns the shape of x.
    """
    if isinstance(quantizer, TrellisQuantizer):
        return _through_coefficients(quantizer, x, outliers)
    reach = _reach(quantizer) if isinstance(quantizer, Quantizer) else None
    if reach is None:
        return x
    return torch.where(_within(x, *reach, outliers), x, x.detach())


def depends_on_outliers(quantizer: BaseQuantizer) -> bool:
    """Whether `passing` depends on which elements are outliers."""
    scheme = quantizer.scheme
    return scheme.outliers.fraction > 0 and (scheme.static or scheme.outliers.by_matrix)


def substitute(x: Tensor, elements: Tensor) -> Tensor:
    """`elements`, bit for bit, with the gradient of x; both of one shape, in the dtype of x."""
    found: Tensor = _Substitute.apply(x, elements)
    return found


class _Substitute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, elements: Tensor) -> Tensor:
        return elements.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


def _within(x: Tensor, low: Tensor, high: Tensor, exact: Tensor | None) -> Tensor:
    """Which elements lie within a range, or are exact."""
    within = (x >= low) & (x <= high)
    return within if exact is None else within | exact


def _reach(quantizer: Quantizer) -> tuple[Tensor, Tensor] | None:
    """The range that codes cover, both ends broadcast to elements; None where it follows these."""
    if quantizer.scale is not None and quantizer.zero is not None:
        reach = quantizer.scale * (1 + ROUNDING)
        return (quantizer.zero - reach)[:, None], (quantizer.zero + reach)[:, None]
    if quantizer.lower is not None and quantizer.upper is not None:
        return quantizer.lower[:, None], quantizer.upper[:, None]
    return None


def _through_coefficients(quantizer: TrellisQuantizer, x: Tensor, outliers: Tensor | None) -> Tensor:
    """Channels of those coefficients that codes reach."""
    assert quantizer.mean is not None and quantizer.entries is not None and quantizer.steps is not None
    coefficients, norm = quantizer.coefficients(x)
    entries = TrellisTables(*quantizer.entries[0].unbind(1)).entries()
    low, high = ((end * quantizer.steps)[quantizer.rates - 1] for end in entries.aminmax(dim=1))
    passes = _within(coefficients, low, high, outliers)
    coefficients = torch.where(passes, coefficients, torch.zeros_like(coefficients))
    return (quantizer.channels_of(coefficients * quantizer.norm_of(norm)) + quantizer.mean[:, None]).to(x.dtype)
