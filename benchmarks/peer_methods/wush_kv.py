"""WUSH-KV (arXiv 2609.38121; transform: WUSH, arXiv 2512.00956; IST-DASLab/WUSH): a transform that is not orthogonal.

L L' is the second moment of what is cached (1% of its mean diagonal added), W W' that of what it meets: queries for keys, the
output projection for values. With s and V the singular values and right vectors of W' L (1% of their mean added to s),
T = H diag(s^1/2) V' L^-1 makes both sides alike and spreads them by the Hadamard matrix H. Keys are stored as T k and queries
rotated by T^-T; values have T in the weights. Codes as in QuEST (arXiv 2502.05003): uniform levels with no zero, clipped at a
multiple of the token's root mean square that is best for a Gaussian. Published with 16 sinks and 128 recent tokens.

Filled in by us, as the code for caches is not public: the metric of values is that of the output projection alone, without a
Hessian of the loss; one transform for each kv head; one 16-bit scale for each token and head. On tasks, though not for
perplexity, the authors round as OSCAR does.
"""

import torch
from torch import Tensor

from benchmarks.peer_methods.base import HALF, TINY, Pair, Quantizer, Statistics, hadamard, stored

CLIPS = {2: 1.4936, 3: 2.0510, 4: 2.5139}  # by bits, in root mean squares
DAMPING = 0.01


def transform(cached: Tensor, met: Tensor) -> Tensor:
    """T [kv_heads, head_dim, head_dim] float64 of the second moments of what is cached and of what it meets."""
    size = cached.shape[-1]
    mean = cached.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    lower = torch.linalg.cholesky(cached + DAMPING * mean * torch.eye(size, dtype=cached.dtype))
    squares, vectors = torch.linalg.eigh(lower.mT @ met @ lower)
    s = squares.clamp_min(0).sqrt()
    s = s + DAMPING * s.mean(1, keepdim=True)
    whiten = torch.linalg.solve_triangular(lower, torch.eye(size, dtype=lower.dtype).expand_as(lower), upper=False)
    return hadamard(size).double() @ torch.diag_embed(s.sqrt()) @ vectors.mT @ whiten


class Transformed(Quantizer):
    """Uniform codes of T x. folded: the transform is part of the weights."""

    def __init__(self, rotation: Tensor, width: int, folded: bool) -> None:
        self.rotation, self.back, self.width, self.folded = rotation.float(), torch.linalg.inv(rotation).float(), width, folded

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.rotation.mT
        limit = stored(CLIPS[self.width] * y.square().mean(-1, keepdim=True).sqrt()).clamp_min(TINY)
        step = 2 * limit / (2**self.width - 1)
        levels = (y.clamp(-limit, limit) / step + 0.5).round() - 0.5
        most = (2**self.width - 1) / 2
        return levels.clamp(-most, most) * step @ self.back.mT

    def bits(self, kv_heads: int, head_dim: int) -> float:
        return self.width + HALF / head_dim

    def tables(self, kv_heads: int, head_dim: int) -> int:
        return 0 if self.folded else 2 * HALF * kv_heads * head_dim**2  # for keys and for queries


def fit(statistics: Statistics, width: int) -> Pair:
    """Both sides of a layer."""
    moments = [part.double().mT @ part.double() / part.shape[1] for part in (statistics.keys, statistics.values)]
    return (
        Transformed(transform(moments[0], statistics.queries), width, folded=False),
        Transformed(transform(moments[1], statistics.output), width, folded=True),
    )
