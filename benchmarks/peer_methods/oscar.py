"""OSCAR (arXiv 2605.17757, section 3; FutureMLS-Lab/OSCAR): rotations of a layer by what attention makes of keys and values.

Keys: eigenvectors of the mean of q q', over the kv heads of the layer; values: of the mean of v v', each token weighted by the
energy k' E[q q'] k of its key. Then a Hadamard matrix and a permutation by reversed bits. Tokens are clipped at their
.96 (keys) or .92 (values) quantile of magnitude and get 2 uniform bits, a scale and a zero point for up to 128 channels.
Published with 64 sinks and 256 recent tokens. The values' rotation is folded into the weights, so its table is not counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peer_methods.base import HALF, Pair, Quantizer, Statistics, affine, hadamard

GROUP, KEY_CLIP, VALUE_CLIP = 128, 0.96, 0.92


def rotation(moment: Tensor) -> Tensor:
    """Eigenvectors, Hadamard, permutation: [head_dim, head_dim] float32 of a second moment of that shape."""
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    size = len(moment)
    width = size.bit_length() - 1
    order = eigenvalues.new_empty(size, dtype=torch.int64)
    order[[int(f"{i:0{width}b}"[::-1], 2) for i in range(size)]] = eigenvalues.argsort(descending=True)
    return (eigenvectors.float() @ hadamard(size))[:, order]


@dataclass(frozen=True)
class Rotated(Quantizer):
    """Clipped uniform codes of rotated tokens. folded: the rotation is part of the weights."""

    rotation: Tensor
    clip: float
    folded: bool
    width: int = 2

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.rotation
        size = y.shape[-1]
        limit = y.abs().sort(-1).values[..., int(self.clip * size), None]
        groups = y.clamp(-limit, limit).unflatten(-1, (-1, min(GROUP, size)))
        return affine(groups, self.width, -1).flatten(-2) @ self.rotation.mT

    def bits(self, kv_heads: int, head_dim: int) -> float:
        return self.width + 2 * HALF / min(GROUP, head_dim)

    def tables(self, kv_heads: int, head_dim: int) -> int:
        return 0 if self.folded else HALF * head_dim**2


def fit(statistics: Statistics) -> Pair:
    """Both sides of a layer."""
    keys, values = statistics.keys.double(), statistics.values.double()
    energy = torch.einsum("htd,hde,hte->ht", keys, statistics.queries, keys)
    weighted = torch.einsum("ht,htd,hte->hde", energy, values, values) / energy.sum(1)[:, None, None]
    return (
        Rotated(rotation(statistics.queries.mean(0)), KEY_CLIP, folded=False),
        Rotated(rotation(weighted.mean(0)), VALUE_CLIP, folded=True),
    )
