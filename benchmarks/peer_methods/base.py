"""What the methods share: how a quantizer is called and counted, and what calibration hands it."""

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = 16  # bits of a stored scale, zero point or norm
TINY = 1e-10


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one layer; the first token of each window is left out.

    queries: [kv_heads, head_dim, head_dim] float64, mean outer product of the queries that read each head, after the rotary
    embedding. keys (after it), values: [kv_heads, n, head_dim] float32. output: [kv_heads, head_dim, head_dim] float64, mean
    outer product of the columns of the output projection by which each head's values leave.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor


class Quantizer(ABC):
    """Keys (after the rotary embedding) or values of one layer, quantized and at once dequantized."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """What is left of elements [kv_heads, tokens, head_dim] float32."""

    @abstractmethod
    def bits(self, kv_heads: int, head_dim: int) -> float:
        """Bits for each element: of its code, and its share of what is stored for tokens and groups."""

    def tables(self, kv_heads: int, head_dim: int) -> int:
        """Bits that a layer stores once, besides its weights."""
        return 0


Pair = tuple[Quantizer, Quantizer]  # of keys and of values


def stored(x: Tensor) -> Tensor:
    """Elements as 16 bits keep them."""
    return x.half().float()


def affine(x: Tensor, bits: int, dim: int) -> Tensor:
    """Rounded to steps between the least and the largest element along a dimension, both stored as a scale and a zero
    point.
    """
    low = stored(x.amin(dim, keepdim=True))
    scale = stored((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).clamp_min(TINY)
    return low + ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale


@functools.cache
def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, orthogonal and symmetric, [size, size] float32."""
    if size & (size - 1):
        raise ValueError(
            f"A Hadamard matrix of {size} channels is not known here; use a model whose heads are a power of two."
        )
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def haar(size: int, seed: int) -> Tensor:
    """A random rotation, [size, size] float32."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


@functools.cache
def lloyd_max(bits: int) -> Tensor:
    """The levels of least squared error for a unit Gaussian, [2^bits] float32, ascending."""
    count = 2**bits
    levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(2000):
        inner = (levels[1:] + levels[:-1]) / 2
        edges = torch.cat([inner.new_tensor([-math.inf]), inner, inner.new_tensor([math.inf])])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = (density[:-1] - density[1:]) / torch.special.ndtr(edges).diff()
    return levels.float()


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The nearest of ascending levels for each element."""
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
