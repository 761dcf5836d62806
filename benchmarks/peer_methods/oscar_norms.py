"""OScaR (arXiv 2605.19660, canalized rotation and omni-token scaling; ZunhaiSu/OScaR-KV-Quant): KIVI's axes, norms aside.

Keys: Hadamard rotation, each token divided by its norm over all heads, 2 bits for each channel in groups of 32 tokens. Values:
Hadamard rotation, 2 bits for each token in groups of 32 channels. Zero points are integers of steps. Published with
KIVI's buffer of up to 128 exact tokens, all of which are quantized when it is full, and no sinks; the length of the buffer is
KIVI's default, as the authors' code leaves it open. The last group of a text may be short; the authors pad it with zeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peer_methods.base import HALF, TINY, Pair, Quantizer, Statistics, hadamard, stored

GROUP, BUFFER = 32, 128


def quantize(x: Tensor, width: int, dim: int) -> Tensor:
    """Steps between the extremes along a dimension, with zero points that are integers of steps."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = stored((high - low) / (2**width - 1)).clamp_min(TINY)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 2**width - 1) - zero) * scale


@dataclass(frozen=True)
class Keys(Quantizer):
    """Unit tokens, by channel."""

    width: int = 2

    def __call__(self, x: Tensor) -> Tensor:
        rotation = hadamard(x.shape[-1])
        norm = x.square().sum((0, 2), keepdim=True).sqrt().clamp_min(TINY)
        groups = (x @ rotation / norm).split(GROUP, 1)
        return torch.cat([quantize(group, self.width, 1) for group in groups], 1) * stored(norm) @ rotation

    def bits(self, kv_heads: int, head_dim: int) -> float:
        return self.width + 2 * HALF / GROUP + HALF / (kv_heads * head_dim)


@dataclass(frozen=True)
class Values(Quantizer):
    """Rotated values, by token."""

    width: int = 2

    def __call__(self, x: Tensor) -> Tensor:
        rotation = hadamard(x.shape[-1])
        return quantize((x @ rotation).unflatten(-1, (-1, GROUP)), self.width, -1).flatten(-2) @ rotation

    def bits(self, kv_heads: int, head_dim: int) -> float:
        return self.width + 2 * HALF / GROUP


def fit(statistics: Statistics) -> Pair:
    """Both sides of a layer; nothing is learned."""
    return Keys(), Values()
