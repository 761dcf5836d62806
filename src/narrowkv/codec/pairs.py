"""Pairs of channels d and d + head_dim / 2, those that the rotary embedding of most models rotates together."""

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
