"""Rotary position embedding by position."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """A rotary embedding whose frequencies do not change with the length of the sequence.

    inverse_frequencies: [rotary_dim / 2] float32. scaling: factor on cosine and sine (yarn), 1 otherwise. interleaved: whether
    channel 2 i turns with channel 2 i + 1, or channel i with channel i + rotary_dim / 2 (Llama). Channels beyond rotary_dim
    are left alone.
    """

    inverse_frequencies: Tensor
    scaling: float = 1.0
    interleaved: bool = False

    def to(self, device: torch.device) -> "Rope":
        """The same embedding with its frequencies on `device`."""
        return Rope(self.inverse_frequencies.to(device), self.scaling, self.interleaved)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [batch, tokens] integer. Returns cosine and sine, [batch, tokens, rotary_dim / 2] float32."""
        angles = positions[..., None].float() * self.inverse_frequencies
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x: [batch, heads, tokens, head_dim] by positions: [1 or batch, tokens], in the dtype of x, as models do."""
        cos, sin = (table[:, None].to(x.dtype) for table in self.cos_sin(positions))
        rotary = 2 * cos.shape[-1]
        turning, rest = x[..., :rotary], x[..., rotary:]
        if self.interleaved:
            first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = turning.chunk(2, dim=-1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
