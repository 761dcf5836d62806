"""Residual: the newest tokens, in full precision, in a buffer that is written in place."""

import torch
from torch import Tensor

from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.outlier_counter import OutlierCounter

Parts = tuple[Tensor, Tensor, Tensor]


class ResidualWindow:
    """Keys and values [batch, kv_heads, tokens, head_dim], and which tokens are skipped [batch, tokens] bool.

    most: the most tokens that it may store; the buffer grows to that and no further.
    """

    def __init__(self, most: int):
        self.most = most
        self.tokens = 0
        self.buffer: list[Tensor] = []  # keys, values, and what is skipped as [batch, 1, capacity, 1]; none before the first
        self.counter: OutlierCounter | None = None  # of a GPU's steps: counts what is no number

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return self.buffer if self.counter is None else [*self.buffer, self.counter.counts]

    def stored(self) -> Parts:
        """Keys, values and what is skipped, without a copy."""
        keys, values, skip = (part[:, :, : self.tokens] for part in self.buffer)
        return keys, values, skip[:, 0, :, 0]

    def oldest(self, count: int, keys: Tensor, values: Tensor, skip: Tensor | None) -> Parts:
        """The first `count` tokens of those stored and of new ones that follow them. Raises ActivationError as
        `OutlierCounter.learn`.
        """
        if self.counter is not None:
            self.counter.exact()
        parts = _parts(keys, values, skip)
        if self.buffer:
            parts = [
                torch.cat([old[:, :, : self.tokens], new], dim=2) if count > self.tokens else old
                for old, new in zip(self.buffer, parts, strict=True)
            ]
        first = [part[:, :, :count] for part in parts]
        return first[0], first[1], first[2][:, 0, :, 0]

    def shift(self, count: int, keys: Tensor, values: Tensor, skip: Tensor | None) -> None:
        """Let go of this many of the `oldest` tokens, and store the others."""
        new = _parts(keys, values, skip)
        remaining = max(self.tokens - count, 0)
        come = self.tokens + keys.shape[2] - count - remaining
        if remaining and count:
            for part in self.buffer:
                part[:, :, :remaining] = part[:, :, self.tokens - remaining : self.tokens].clone()
        self.crop(remaining)
        self.reserve(come, keys, values)
        for part, fresh in zip(self.buffer, new, strict=True):
            part[:, :, remaining : remaining + come] = fresh[:, :, fresh.shape[2] - come :]
        self.tokens = remaining + come

    def reserve(self, new: int, keys: Tensor, values: Tensor) -> None:
        """Make sure that this many more tokens, such as those of keys and values, fit."""
        buffer = self.buffer[0].shape[2] if self.buffer else 0
        if self.buffer and self.tokens + new <= buffer:
            return
        old, buffer = self.buffer, max(self.tokens + new, min(2 * buffer, self.most))
        self.buffer = [part.new_zeros(*part.shape[:2], buffer, part.shape[3]) for part in _parts(keys, values, None)]
        for part, before in zip(self.buffer, old, strict=False):
            part[:, :, : self.tokens] = before[:, :, : self.tokens]

    def prepare_step(self, new: int, keys: Tensor, values: Tensor) -> None:
        """`reserve` for tokens that come by `step`."""
        self.reserve(new, keys, values)
        if self.counter is None:
            self.counter = OutlierCounter(keys.device)
            self.buffer[2][:, :, self.tokens :] = False
        self.counter.promise(1)

    def step(self, keys: Tensor, values: Tensor, skip: Tensor | None, offsets: Tensor | None = None) -> None:
        """Store tokens on a GPU, without waiting for it, behind those stored, or from offsets[1] on; `tokens` stays.

        Nothing is skipped if offsets are given.
        """
        assert self.counter is not None
        first = self.tokens if offsets is None else 0
        for buffer, elements in zip(self.buffer, (keys, values), strict=False):
            cuda.put(buffer, first, elements, self.counter.counts, None if offsets is None else offsets[1:])
        if offsets is None:
            new = slice(first, first + keys.shape[2])
            self.buffer[2][:, 0, new, 0] = False if skip is None else skip

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens; where steps write, nothing is skipped beyond them."""
        if self.counter is not None and tokens < self.tokens:
            self.buffer[2][:, :, tokens:] = False
        self.tokens = tokens

    def select(self, rows: Tensor) -> None:
        """Keep the sequences named by `rows` [n] int64, in that order, repeats allowed."""
        self.buffer = [part[rows] for part in self.buffer]


def _parts(keys: Tensor, values: Tensor, skip: Tensor | None) -> list[Tensor]:
    skip = keys.new_zeros(len(keys), keys.shape[2], dtype=torch.bool) if skip is None else skip
    return [keys, values, skip[:, None, :, None]]
