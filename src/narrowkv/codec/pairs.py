"""Pairs of channels d and d + head_dim / 2, those that the rotary embedding of most models rotates together."""

import torch
from torch import Tensor


def to_pairs(channels: Tensor) -> Tensor:
    """[..., head_dim] -> [..., head_dim / 2, 2]."""
    return channels.unflatten(-1, (2, -1)).transpose(-1, -2)


def from_pairs(pairs: Tensor) -> Tensor:
    """Inverse of `to_pairs`."""
    return pairs.transpose(-1, -2).flatten(-2)


def times(channels: Tensor, matrices: Tensor) -> Tensor:
    """Channels [..., head_dim], each pair times its own matrix: [..., head_dim / 2, 2, 2]."""
    return from_pairs((to_pairs(channels)[..., None, :] @ matrices)[..., 0, :])


def times_by_offset(channels: Tensor, matrices: Tensor) -> Tensor:
    """Channels [batch, kv_heads, tokens, head_dim], each pair of a token times its own matrix for the token's offset.

    matrices: [2, 2, kv_heads, 1, n, head_dim / 2]; token t has offset t modulo n.
    """
    tokens, n = channels.shape[2], matrices.shape[4]
    if tokens % n:
        channels = torch.nn.functional.pad(channels, (0, 0, 0, -tokens % n))
    first, second = channels.unflatten(2, (-1, n)).chunk(2, dim=-1)  # [batch, kv_heads, tokens / n, n, head_dim / 2]
    found = [torch.addcmul(first * a, second, b) for a, b in zip(matrices[0], matrices[1], strict=True)]
    return torch.cat(found, dim=-1).flatten(2, 3)[:, :, :tokens]
