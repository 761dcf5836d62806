"""QuantizedCache of transformers 5.23 with its defaults (groups of 64, axis 0): optimum-quanto 0.2.7 and hqq 0.2.8.

Written again in plain torch, as neither package is among the requirements. quanto: 64 neighboring channels of a token have a
scale and a shift. hqq: elements that lie 1/64 of the whole tensor apart make a group, which mixes tokens, and heads; zero
points are refined by half-quadratic steps (Badri and Shaji 2023) until the mean error grows. Published with up to 128 exact
tokens: whenever that many are there, all is quantized. What QuantizedCache quantized before, it then quantizes again; here it
is quantized once, and the first prompt is not handed back exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peer_methods.base import HALF, Pair, Quantizer, Statistics

GROUP, BUFFER = 64, 128
NORM, PENALTY, STEPS = 0.7, 10.0, 20  # the norm that hqq lessens, and how it goes about it
LEAST_RANGE, MOST_SCALE = 1e-4, 2e4


@dataclass(frozen=True)
class Quanto(Quantizer):
    """MaxOptimizer: between the extremes of each group."""

    width: int

    def __call__(self, x: Tensor) -> Tensor:
        groups = x.reshape(-1, GROUP)
        low = groups.amin(1, keepdim=True)
        scale = (groups.amax(1, keepdim=True) - low) / (2**self.width - 1)
        codes = ((groups - low) / scale).round().clamp(0, 2**self.width - 1)
        return (scale * codes + low).view_as(x)

    def bits(self, kv_heads: int, head_dim: int) -> float:
        return self.width + 2 * HALF / GROUP


@dataclass(frozen=True)
class Hqq(Quantizer):
    """HQQ with early stopping, its default."""

    width: int

    def __call__(self, x: Tensor) -> Tensor:
        groups = x.reshape(GROUP, -1)
        low = groups.amin(0, keepdim=True)
        extent = groups.amax(0, keepdim=True) - low
        scale = torch.where(extent <= LEAST_RANGE, torch.ones_like(extent), (2**self.width - 1) / extent).clamp(max=MOST_SCALE)
        zero = self._refined(groups, scale, -low * scale)
        return ((self._codes(groups, scale, zero) - zero) / scale).view_as(x)

    def _codes(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (groups * scale + zero).round().clamp(0, 2**self.width - 1)

    def _refined(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Zero points [1, groups] after half-quadratic steps; the one that made the error grow still counts, as in hqq."""
        least = float("inf")
        for _ in range(STEPS):
            codes = self._codes(groups, scale, zero)
            error = groups - (codes - zero) / scale
            shrunk = error.sign() * (error.abs() - error.abs().pow(NORM - 1) / PENALTY).clamp_min(0)
            zero = (codes - (groups - shrunk) * scale).mean(0, keepdim=True)
            mean = error.abs().mean().item()
            if mean >= least:
                break
            least = mean
        return zero

    def bits(self, kv_heads: int, head_dim: int) -> float:
        return self.width + 2 * HALF / GROUP


def fit_quanto(statistics: Statistics, width: int) -> Pair:
    """Both sides of a layer; nothing is learned."""
    return Quanto(width), Quanto(width)


def fit_hqq(statistics: Statistics, width: int) -> Pair:
    """Both sides of a layer; nothing is learned."""
    return Hqq(width), Hqq(width)
