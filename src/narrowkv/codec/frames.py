"""Frames: keys stored before the rotary embedding are turned to the middle of their frame of 16 tokens.

Where positions follow each other, as they mostly do, one query, turned to that place, then meets all keys of a frame: nothing
is turned for each token when a cache is read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FRAME = 16  # tokens
MIDDLE = FRAME // 2  # the token of a frame that is not turned


def place_dtype(head_dim: int) -> torch.dtype:
    """In what places of a head's channels are kept."""
    return torch.uint8 if head_dim <= 256 else torch.int16


@dataclass(frozen=True)
class Frames:
    """How keys turn within a frame.

    channels: [head_dim] uint8, of more than 256 int16, which channel lies where: those that turn together lie half a head
    apart. frequencies: [head_dim / 2] float32, by how much such a pair turns from a position to the next, in radians; 0 where
    it does not.
    """

    channels: Tensor
    frequencies: Tensor

    @classmethod
    def of(cls, head_dim: int, inverse_frequencies: Tensor | None = None, interleaved: bool = False) -> "Frames":
        """Those of a rotary embedding, as `attention.rope` has them; without one nothing turns."""
        turning = torch.zeros(0, dtype=torch.float32, device="cpu") if inverse_frequencies is None else inverse_frequencies
        pairs = len(turning)
        every = torch.arange(head_dim, dtype=place_dtype(head_dim), device=turning.device)
        rotary, rest = every[: 2 * pairs], every[2 * pairs :].tensor_split(2)
        first, second = (rotary[::2], rotary[1::2]) if interleaved else rotary.tensor_split(2)
        channels = torch.cat([first, rest[0], second, rest[1]])
        return cls(channels, torch.nn.functional.pad(turning.float(), (0, head_dim // 2 - pairs)))

    def turn(self, x: Tensor, first: int) -> Tensor:
        """Channels [..., tokens, head_dim] float64 of tokens from a block's token `first` on, in their places and turned."""
        at = torch.arange(first, first + x.shape[-2], dtype=torch.int64, device=x.device) % FRAME - MIDDLE
        return self._turned(x[..., self.channels.long()], at)

    def turn_back(self, x: Tensor) -> Tensor:
        """Channels [..., tokens, head_dim] of whole blocks, or their first tokens, from what `turn` made of them."""
        at = torch.arange(x.shape[-2], dtype=torch.int64, device=x.device) % FRAME - MIDDLE
        return self._turned(x, -at)[..., self.channels.long().argsort()]

    def turn_moment(self, moment: Tensor) -> Tensor:
        """Mean of second moments [kv_heads, head_dim, head_dim] float64 of what is as likely at any place of a frame."""
        one_side = moment[..., self.channels.long()].mT[..., self.channels.long()]
        mean = torch.zeros_like(one_side)
        for place in range(FRAME):
            at = torch.tensor([place - MIDDLE], dtype=torch.int64, device=moment.device)
            mean += self._turned(self._turned(one_side, at).mT, at) / FRAME
        return mean

    def _turned(self, x: Tensor, at: Tensor) -> Tensor:
        """Pairs of x [..., n, head_dim], turned by so many positions [n] or [1]."""
        angles = at[:, None].double() * self.frequencies.double()
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
