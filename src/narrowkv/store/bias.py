"""Bias: what a model's projections add to every key and value, taken out of what is quantized and put back when it is read.

Any number that is known both when keys are written and when they are read is exact. Of keys that are stored after the rotary
embedding it is the bias rotated to the position of each token, so that what rotates fast goes too.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from narrowkv.codec.scheme import Scheme
from narrowkv.store.positions import PositionBuffer

Elements = tuple[Tensor, Tensor | None]  # [batch, kv_heads, tokens, head_dim], and which are skipped [batch, tokens]


class RotaryEmbedding(Protocol):
    """A rotary embedding, as `attention.rope` has them."""

    def rotate_precisely(self, x: Tensor, rope_state: Tensor) -> Tensor: ...


@dataclass
class Bias:
    """What is taken out of the keys and of the values of a layer.

    keys, values: [kv_heads, head_dim] float32, or None. rope: rotates that of the keys by the position buffer's entries of
    each token; None where keys are stored before it, or without one.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    rope: RotaryEmbedding | None = None
    position_buffer: PositionBuffer | None = None

    def tensors(self) -> list[Tensor]:
        """All stored tensors except the position buffer, which layers share."""
        return [part for part in (self.keys, self.values) if part is not None]

    @property
    def depends_on_position(self) -> bool:
        """Whether each token's keys have a bias of their own."""
        return self.keys is not None and self.rope is not None

    def key_bias(self, first: int, tokens: int) -> Tensor | None:
        """Of this many tokens from the token `first` on: [batch or 1, kv_heads, tokens or 1, head_dim]."""
        if self.keys is None or self.rope is None or self.position_buffer is None:
            return None if self.keys is None else self.keys[None, :, None]
        return self.rotated(self.position_buffer.read(first, first + tokens))

    def rotated(self, rope_state: Tensor) -> Tensor:
        """That of keys, rotated by what is stored of some tokens [batch, n, ...]: [batch, kv_heads, n, head_dim] float32.

        In float64, so that whoever puts angles together of others finds the same.
        """
        assert self.keys is not None and self.rope is not None
        wide = self.keys[None, :, None].expand(len(rope_state), -1, rope_state.shape[1], -1)
        return self.rope.rotate_precisely(wide, rope_state).float()

    def subtract(
        self, keys: Elements, values: Elements, key_bias: Tensor | None, schemes: tuple[Scheme, Scheme]
    ) -> tuple[Elements, Elements]:
        """Keys and values as they are encoded, and what is skipped of each. key_bias: of the same tokens."""
        of_values = None if self.values is None else self.values[None, :, None]
        return (subtract_constant(keys[0], key_bias, schemes[0]), keys[1]), (
            subtract_constant(values[0], of_values, schemes[1]),
            values[1],
        )

    def restore(self, pair: tuple[Tensor, Tensor], start: int) -> tuple[Tensor, Tensor]:
        """Decoded keys and values, the first of which is the token `start`, with what was taken out; changed in place."""
        keys, values = pair
        constant = self.key_bias(start, keys.shape[2])
        if constant is not None:
            keys += constant
        if self.values is not None:
            values += self.values[:, None]
        return keys, values


def subtract_constant(x: Tensor, constant: Tensor | None, scheme: Scheme) -> Tensor:
    """x [batch, kv_heads, tokens, head_dim] without what `Bias` has of it, in float32.

    The result stays so, unless elements are among it that are to be stored in the dtype of x.
    """
    if constant is None:
        return x
    difference = x.to(torch.promote_types(x.dtype, torch.float32)) - constant
    return difference.to(x.dtype) if scheme.outliers.fraction else difference
