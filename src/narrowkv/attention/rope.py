"""Rotary position embedding of stored keys, by position."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """A rotary embedding whose frequencies do not change with the length of the sequence.

    inverse_frequencies: [rotary_dim / 2] float32. scaling: factor on cosine and sine (yarn), 1 otherwise. Channel i turns
    with channel i + rotary_dim / 2 (the `half` convention of Llama); channels beyond rotary_dim are left alone.
    """

    inverse_frequencies: Tensor
    scaling: float = 1.0

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [batch, tokens] integer. Returns cosine and sine, [batch, tokens, rotary_dim / 2] float32."""
        angles = positions[..., None].float() * self.inverse_frequencies.to(positions.device)
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x: [batch, heads, tokens, head_dim] by positions: [batch, tokens]. Same shape, float32 or more."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = (table[:, None].to(x.dtype) for table in self.cos_sin(positions))
        half = cos.shape[-1]
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
