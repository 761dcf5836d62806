"""TurboQuant (Zandieh et al., ICLR 2026) as vLLM has it: vllm/model_executor/layers/quantization/turboquant.

Keys: norm aside, Hadamard rotation, Lloyd-Max levels of a Gaussian, the decoded vector brought to unit norm again ("norm
correction"); vLLM leaves the paper's QJL out. Values: uniform, a scale and a zero point for each token and head. Presets are
4 and 3 bits; 2 is ours. The published terms keep the first and the last two layers exact.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from benchmarks.peer_methods.base import HALF, TINY, Pair, Quantizer, Statistics, affine, hadamard, lloyd_max, nearest, stored


@dataclass(frozen=True)
class Keys(Quantizer):
    """Levels of a rotated unit vector."""

    width: int

    def __call__(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        norm = x.norm(dim=-1, keepdim=True).clamp_min(TINY)
        decoded = nearest(x / norm @ hadamard(size) * math.sqrt(size), lloyd_max(self.width))
        return decoded / decoded.norm(dim=-1, keepdim=True) * stored(norm) @ hadamard(size)

    def bits(self, kv_heads: int, head_dim: int) -> float:
        return self.width + HALF / head_dim


@dataclass(frozen=True)
class Values(Quantizer):
    """Uniform steps between the extremes of each token."""

    width: int

    def __call__(self, x: Tensor) -> Tensor:
        return affine(x, self.width, -1)

    def bits(self, kv_heads: int, head_dim: int) -> float:
        return self.width + 2 * HALF / head_dim


def fit(statistics: Statistics, keys: int, values: int) -> Pair:
    """Both sides of a layer; nothing is learned."""
    return Keys(keys), Values(values)
