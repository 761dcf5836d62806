"""Block-GTQ (arXiv 2606.24033, sections 3 and A; JIA-Lab-research/blockgtq): bits by the energy of rotary pairs.

Keys: a pair of channels that rotate together scores (E||q||^2 + E||k||^2) / 2; each next bit, of 1 to 8, goes to the pair
whose score * 4^-bits is the largest, the same budget in every head. Pairs of equal bits make a group with a norm, a random
rotation and Lloyd-Max levels, decoded with norm correction. Values: TurboQuant-MSE, one group. Published without sinks or a
window.

The authors' code quantizes keys before the rotary embedding to measure accuracy and after it to serve; here after it. Scores
and norms are the same for both, as they do not depend on how pairs are rotated.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peer_methods.base import HALF, TINY, Pair, Quantizer, Statistics, haar, lloyd_max, nearest, stored

LEAST, MOST = 1, 8  # bits of a pair
KEY_SEED, VALUE_SEED = 42, 1000


def allocate(scores: Tensor, budget: int) -> Tensor:
    """Bits [n] of pairs that score [n], `budget` in all."""
    bits = torch.full(scores.shape, LEAST)
    for _ in range(budget - int(bits.sum())):
        priority = (scores * 4.0 ** -bits.double()).masked_fill(bits == MOST, -1)
        bits[priority.argmax()] += 1
    return bits


def quantize(x: Tensor, width: int, seed: int, correct: bool) -> Tensor:
    """TurboQuant-MSE of vectors [..., n]: norm aside, rotation, levels; with norm correction where `correct`."""
    size = x.shape[-1]
    rotation = haar(size, seed)
    norm = x.norm(dim=-1, keepdim=True).clamp_min(TINY)
    decoded = nearest(x / norm @ rotation.mT * math.sqrt(size), lloyd_max(width)) / math.sqrt(size)
    if correct:
        decoded = decoded / decoded.norm(dim=-1, keepdim=True)
    return decoded * stored(norm) @ rotation


class Keys(Quantizer):
    """Groups of pairs of equal bits."""

    def __init__(self, statistics: Statistics, width: int) -> None:
        energy = statistics.queries.diagonal(dim1=1, dim2=2) + statistics.keys.double().square().mean(1)
        pairs = (
            energy.unflatten(-1, (2, -1)).sum(1) / 2
        )  # the rotary embedding rotates channel i with channel i + head_dim / 2
        self.allocation = torch.stack([allocate(scores, width * len(scores)) for scores in pairs])
        self.width = width

    def __call__(self, x: Tensor) -> Tensor:
        decoded = torch.zeros_like(x)
        for head, pairs in enumerate(self.allocation.repeat(1, 2)):
            for width in pairs.unique().tolist():
                channels = (pairs == width).nonzero()[:, 0]
                decoded[head][:, channels] = quantize(x[head][:, channels], width, KEY_SEED + width, correct=True)
        return decoded

    def bits(self, kv_heads: int, head_dim: int) -> float:
        groups = sum(len(pairs.unique()) for pairs in self.allocation)
        return self.width + groups * HALF / (kv_heads * head_dim)

    def tables(self, kv_heads: int, head_dim: int) -> int:
        return kv_heads * head_dim // 2 * 3  # what each pair gets; rotations come from seeds


@dataclass(frozen=True)
class Values(Quantizer):
    """TurboQuant-MSE of whole heads."""

    width: int

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([quantize(part, self.width, VALUE_SEED + head, correct=False) for head, part in enumerate(x)])

    def bits(self, kv_heads: int, head_dim: int) -> float:
        return self.width + HALF / head_dim


def fit(statistics: Statistics, keys: int, values: int) -> Pair:
    """Both sides of a layer."""
    return Keys(statistics, keys), Values(values)
