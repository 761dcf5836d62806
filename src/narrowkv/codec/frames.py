"""Frames: keys stored before the rotary embedding are rotated to the middle of their frame of 16 tokens.

Where positions follow each other, as they mostly do, one query, rotated to that position, then meets all keys of a frame:
nothing is rotated for each token when a cache is read.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

FRAME = 16  # tokens
MIDDLE = FRAME // 2  # the token of a frame that is not rotated


def index_dtype(head_dim: int) -> torch.dtype:
    """The order in which a head's channels are stored."""
    return torch.uint8 if head_dim <= 256 else torch.int16


@dataclass(frozen=True)
class Frames:
    """How keys rotate within a frame.

    channels: [head_dim] uint8, of more than 256 int16, which channel lies where: those that rotate together lie half a head
    apart. frequencies: [head_dim / 2] float32, by how much such a pair rotates from a position to the next, in radians; 0
    where it does not.
    """

    channels: Tensor
    frequencies: Tensor

    @classmethod
    def of(cls, head_dim: int, inverse_frequencies: Tensor | None = None, interleaved: bool = False) -> "Frames":
        """Those of a rotary embedding, as `attention.rope` has them; without one nothing rotates."""
        inverse = torch.zeros(0, dtype=torch.float32, device="cpu") if inverse_frequencies is None else inverse_frequencies
        pairs = len(inverse)
        every = torch.arange(head_dim, dtype=index_dtype(head_dim), device=inverse.device)
        rotary, rest = every[: 2 * pairs], every[2 * pairs :].tensor_split(2)
        first, second = (rotary[::2], rotary[1::2]) if interleaved else rotary.tensor_split(2)
        channels = torch.cat([first, rest[0], second, rest[1]])
        return cls(channels, torch.nn.functional.pad(inverse.float(), (0, head_dim // 2 - pairs)))

    def rotate(self, x: Tensor, first: int) -> Tensor:
        """Channels [..., tokens, head_dim] float64 of tokens from a block's token `first` on, in stored order and rotated."""
        return _rotated(x[..., self.channels.long()], *self.turns(first, x.shape[-2]))

    def to_middle(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Channels [batch, heads, tokens, head_dim] float64, in their own order, rotated to the middle of their frames.

        offsets: [batch, tokens] int64, of tokens in their frames.
        """
        angles = (offsets - MIDDLE)[:, None, :, None].double() * self.frequencies.double()
        return self.in_order(_rotated(x[..., self.channels.long()], angles.cos(), angles.sin()))

    def turns(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens, head_dim / 2] float64 of what `rotate` rotates pairs by."""
        at = torch.arange(first, first + tokens, dtype=torch.int64, device=self.frequencies.device) % FRAME - MIDDLE
        angles = at[:, None].double() * self.frequencies.double()
        return angles.cos(), angles.sin()

    def back(self) -> Tensor:
        """What undoes `rotate`, at each offset in a frame: [16, head_dim / 2, 2, 2] float64, by which pairs are multiplied."""
        cosines, sines = self.turns(0, FRAME)
        return torch.stack([torch.stack([cosines, -sines], -1), torch.stack([sines, cosines], -1)], -2)

    def in_order(self, x: Tensor) -> Tensor:
        """Channels [..., head_dim] from their stored order."""
        return x if self._inverse is None else x[..., self._inverse]

    @functools.cached_property
    def _inverse(self) -> Tensor | None:
        """Where each channel is stored: [head_dim] int64; None where all lie in their order."""
        inverse = self.channels.long().argsort()
        return None if bool((inverse.diff() == 1).all()) else inverse

    def rotate_moment(self, moment: Tensor) -> Tensor:
        """Mean of second moments [kv_heads, head_dim, head_dim] float64 of what is equally likely at any offset in a frame."""
        one_side = moment[..., self.channels.long()].mT[..., self.channels.long()]
        mean = torch.zeros_like(one_side)
        for offset in range(FRAME):
            turns = self.turns(offset, 1)
            mean += _rotated(_rotated(one_side, *turns).mT, *turns) / FRAME
        return mean


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Pairs of x [..., n, head_dim], rotated by angles whose cosines and sines are [n or 1, head_dim / 2]."""
    cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
