"""Bias: what a model's projections add to every key and value, taken out of what is quantised and put back when it is read.

Any number that is known both when keys are written and when they are read is exact. Of keys that are stored after the rotary
embedding it is the bias turned to the position of each token, so that what turns fast goes too.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from narrowkv.codec.scheme import Scheme
from narrowkv.store.ledger import Ledger

Numbers = tuple[Tensor, Tensor | None]  # [batch, kv_heads, tokens, head_dim], and which are skipped [batch, tokens]


class Turning(Protocol):
    """A rotary embedding, as `attention.rope` has them."""

    def rotate_precisely(self, x: Tensor, kept: Tensor) -> Tensor: ...


@dataclass
class Bias:
    """What is taken out of the keys and of the values of a layer.

    keys, values: [kv_heads, head_dim] float32, or None. rope: turns that of the keys by what the ledger holds of each token;
    None where keys are stored before it, or without one.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    rope: Turning | None = None
    ledger: Ledger | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors that are held, but for the ledger, which layers share."""
        return [part for part in (self.keys, self.values) if part is not None]

    @property
    def turns(self) -> bool:
        """Whether each token's keys have a bias of their own."""
        return self.keys is not None and self.rope is not None

    def of_keys(self, first: int, tokens: int) -> Tensor | None:
        """Of so many tokens from the token `first` on: [batch or 1, kv_heads, tokens or 1, head_dim]."""
        if self.keys is None or self.rope is None or self.ledger is None:
            return None if self.keys is None else self.keys[None, :, None]
        return self.turned(self.ledger.read(first, first + tokens))

    def turned(self, kept: Tensor) -> Tensor:
        """That of keys, turned by what is kept of some tokens [batch, n, ...]: [batch, kv_heads, n, head_dim] float32.

        In float64, so that whoever puts angles together of others finds the same.
        """
        assert self.keys is not None and self.rope is not None
        wide = self.keys[None, :, None].expand(len(kept), -1, kept.shape[1], -1)
        return self.rope.rotate_precisely(wide, kept).float()

    def taken_out(
        self, keys: Numbers, values: Numbers, of_keys: Tensor | None, schemes: tuple[Scheme, Scheme]
    ) -> tuple[Numbers, Numbers]:
        """Keys and values as they are encoded, and what is skipped of each. of_keys: of the same tokens."""
        of_values = None if self.values is None else self.values[None, :, None]
        return (without(keys[0], of_keys, schemes[0]), keys[1]), (without(values[0], of_values, schemes[1]), values[1])

    def put_back(self, pair: tuple[Tensor, Tensor], start: int) -> tuple[Tensor, Tensor]:
        """Decoded keys and values, the first of which is the token `start`, with what was taken out; changed in place."""
        keys, values = pair
        constant = self.of_keys(start, keys.shape[2])
        if constant is not None:
            keys += constant
        if self.values is not None:
            values += self.values[:, None]
        return keys, values


def without(x: Tensor, constant: Tensor | None, scheme: Scheme) -> Tensor:
    """x [batch, kv_heads, tokens, head_dim] without what `Bias` has of it, in float32.

    The result stays so, unless numbers are among it that are to be kept in the dtype of x.
    """
    if constant is None:
        return x
    difference = x.to(torch.promote_types(x.dtype, torch.float32)) - constant
    return difference.to(x.dtype) if scheme.outliers else difference
