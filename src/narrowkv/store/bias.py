"""Bias: what a model's projections add to every key and value, taken out of what is quantised and put back when it is read.

Any constant that is known when numbers are written and when they are read is exact. Keys that are stored after the rotary
embedding do not have one for all tokens, but a block has one nearly: the bias turned to the position of its first token.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from narrowkv.codec.scheme import BLOCK, Scheme
from narrowkv.store.ledger import Ledger

Numbers = tuple[Tensor, Tensor | None]  # [batch, kv_heads, tokens, head_dim], and which are skipped [batch, tokens]


class Turning(Protocol):
    """A rotary embedding, as `attention.rope` has them."""

    def rotate(self, x: Tensor, kept: Tensor) -> Tensor: ...


@dataclass
class Bias:
    """What is taken out of the keys and of the values of a layer.

    keys, values: [kv_heads, head_dim] float32, or None. rope: turns that of the keys to the first token of each block, by what
    the ledger holds of that token; None where keys are stored before it, or without one.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    rope: Turning | None = None
    ledger: Ledger | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors that are held, but for the ledger, which layers share."""
        return [part for part in (self.keys, self.values) if part is not None]

    @property
    def of_blocks(self) -> bool:
        """Whether each block of keys has a constant of its own."""
        return self.keys is not None and self.rope is not None

    def of_keys(self, first: int, blocks: int) -> Tensor | None:
        """Of so many blocks of 64 tokens from the token `first` on: [batch or 1, kv_heads, blocks or 1, head_dim]."""
        if self.keys is None or self.rope is None or self.ledger is None:
            return None if self.keys is None else self.keys[None, :, None]
        return self.turned(self.ledger.read(first, first + (blocks - 1) * BLOCK + 1)[:, ::BLOCK])

    def turned(self, kept: Tensor) -> Tensor:
        """That of keys, turned by what the ledger holds of some tokens [batch, n, ...]: [batch, kv_heads, n, head_dim]."""
        assert self.keys is not None and self.rope is not None
        wide = self.keys[None, :, None].expand(len(kept), -1, kept.shape[1], -1)
        return self.rope.rotate(wide, kept)

    def taken_out(
        self, keys: Numbers, values: Numbers, of_keys: Tensor | None, schemes: tuple[Scheme, Scheme]
    ) -> tuple[Numbers, Numbers]:
        """Keys and values as they are encoded, and what is skipped of each. of_keys: of the blocks that they are from."""
        of_values = None if self.values is None else self.values[None, :, None]
        return (without(keys[0], of_keys, schemes[0]), keys[1]), (without(values[0], of_values, schemes[1]), values[1])


def without(x: Tensor, constant: Tensor | None, scheme: Scheme) -> Tensor:
    """x [batch, kv_heads, tokens, head_dim] without a constant [batch or 1, kv_heads, blocks or 1, head_dim] of each block.

    In float32; the result stays so, unless numbers are among it that are to be kept in the dtype of x.
    """
    if constant is None:
        return x
    difference = x.to(torch.promote_types(x.dtype, torch.float32)) - by_token(constant, x.shape[2])
    return difference.to(x.dtype) if scheme.outliers else difference


def by_token(constant: Tensor, tokens: int) -> Tensor:
    """A constant of each block as one of each token; of a single block for all, however many."""
    return constant if constant.shape[2] == 1 else constant.repeat_interleave(BLOCK, dim=2)[:, :, :tokens]
