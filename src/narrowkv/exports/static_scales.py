"""Static symmetric scales: one for a tensor, a head or a channel, known before the first token comes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.errors import RecipeError

STRATEGIES = ("tensor", "head", "channel")
BITS = {"int8": 8, "int4": 4, "fp8": 8}
LARGEST_FP8 = 448.0  # of e4m3
SMALLEST = 2.0**-20  # magnitude that a scale is made for: engines refuse scales of 0


@dataclass(frozen=True)
class StaticQuantization:
    """A datatype and how many elements share a scale; there is no zero point, and nothing is stored exactly.

    datatype: int8, int4 or fp8 (e4m3). strategy: a scale for each tensor, head or channel. Raises RecipeError for others.
    """

    datatype: str
    strategy: str

    def __post_init__(self) -> None:
        for given, known in ((self.datatype, tuple(BITS)), (self.strategy, STRATEGIES)):
            if given not in known:
                raise RecipeError(f"Static scales have no {given!r}; choose one of {', '.join(known)}.")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.datatype]

    @property
    def shared(self) -> tuple[int, ...]:
        """The dimensions of [..., kv_heads, head_dim] that share a scale."""
        return {"tensor": (-2, -1), "head": (-1,), "channel": ()}[self.strategy]

    @property
    def limit(self) -> float:
        """The magnitude, in scales, at which a range ends: both ends of an integer range are off by half a scale at most."""
        return LARGEST_FP8 if self.datatype == "fp8" else 2 ** (self.bits - 1) - 0.5

    def scales(self, largest: Tensor) -> Tensor:
        """Scales of magnitudes up to `largest` [kv_heads, head_dim]: [1, 1], [kv_heads, 1] or [kv_heads, head_dim] float32."""
        reach = largest.float().amax(self.shared, keepdim=True) if self.shared else largest.float()
        return reach.clamp(min=SMALLEST) / self.limit

    def rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        """What is read back of x [batch, kv_heads, tokens, head_dim] that was stored with such scales, float32."""
        scaled = x.float() / scale[:, None]
        if self.datatype == "fp8":
            codes = scaled.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).float()
        else:
            codes = scaled.round().clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        return codes * scale[:, None]

    def bits_per_element(self, kv_heads: int, head_dim: int, tokens: int) -> float:
        """Bits of an element of a layer's keys, or values, of so long a cache: codes, and scales of 32 bits."""
        scales = {"tensor": 1, "head": kv_heads, "channel": kv_heads * head_dim}[self.strategy]
        return self.bits + 32 * scales / (kv_heads * head_dim * tokens)
