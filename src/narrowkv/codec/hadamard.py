"""A randomized Hadamard rotation of each head, which spreads outlier channels over all, so that one range fits them.

QuaRot, arXiv 2404.00456; QuIP#, arXiv 2402.04396.
"""

import functools

import torch
from torch import Tensor


@functools.cache
def _tables(head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Signs [head_dim] and the orthogonal symmetric matrix [n, n], n the largest power of 2 that divides head_dim.

    The signs look random but are a fixed formula: what is saved today is read tomorrow.
    """
    signs = 1.0 - 2.0 * (torch.arange(head_dim, dtype=torch.int64, device="cpu") * 0x9E3779B1 >> 16 & 1).float()
    matrix, size = torch.ones(1, 1, dtype=torch.float32, device="cpu"), head_dim & -head_dim
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return signs.to(device), (matrix / size**0.5).to(device)


def rotate(x: Tensor) -> Tensor:
    """Rotate x [..., head_dim] float32."""
    signs, matrix = _tables(x.shape[-1], x.device)
    return ((x * signs).unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def rotate_back(x: Tensor) -> Tensor:
    """Inverse of `rotate`."""
    signs, matrix = _tables(x.shape[-1], x.device)
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2) * signs
