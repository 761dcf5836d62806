"""Window: the newest tokens, exact, in room that is written in place."""

import torch
from torch import Tensor

from narrowkv.codec import cuda
from narrowkv.codec.tally import Tally

Parts = tuple[Tensor, Tensor, Tensor]


class Window:
    """Keys and values [batch, kv_heads, tokens, head_dim], and which tokens are skipped [batch, tokens] bool.

    most: how many tokens it may come to hold; room grows to that and no further.
    """

    def __init__(self, most: int):
        self.most = most
        self.tokens = 0
        self.room: list[Tensor] = []  # keys, values, and what is skipped as [batch, 1, room, 1]; none before the first
        self.tally: Tally | None = None  # of a GPU's steps: counts what is no number

    def tensors(self) -> list[Tensor]:
        """All tensors that are held."""
        return self.room if self.tally is None else [*self.room, self.tally.counts]

    def held(self) -> Parts:
        """Keys, values and what is skipped, without a copy."""
        keys, values, skip = (part[:, :, : self.tokens] for part in self.room)
        return keys, values, skip[:, 0, :, 0]

    def oldest(self, count: int, keys: Tensor, values: Tensor, skip: Tensor | None) -> Parts:
        """The first `count` tokens of those held and of new ones that follow them. Raises ActivationError as `Tally.learn`."""
        if self.tally is not None:
            self.tally.exact()
        parts = _parts(keys, values, skip)
        if self.room:
            parts = [
                torch.cat([old[:, :, : self.tokens], new], dim=2) if count > self.tokens else old
                for old, new in zip(self.room, parts, strict=True)
            ]
        first = [part[:, :, :count] for part in parts]
        return first[0], first[1], first[2][:, 0, :, 0]

    def shift(self, count: int, keys: Tensor, values: Tensor, skip: Tensor | None) -> None:
        """Let go of so many of the `oldest` tokens, and hold the others."""
        new = _parts(keys, values, skip)
        kept = max(self.tokens - count, 0)
        come = self.tokens + keys.shape[2] - count - kept
        if kept and count:
            for part in self.room:
                part[:, :, :kept] = part[:, :, self.tokens - kept : self.tokens].clone()
        self.crop(kept)
        self.reserve(come, keys, values)
        for part, fresh in zip(self.room, new, strict=True):
            part[:, :, kept : kept + come] = fresh[:, :, fresh.shape[2] - come :]
        self.tokens = kept + come

    def reserve(self, new: int, keys: Tensor, values: Tensor) -> None:
        """Make sure that so many more tokens, such as those of keys and values, find room."""
        room = self.room[0].shape[2] if self.room else 0
        if self.room and self.tokens + new <= room:
            return
        old, room = self.room, max(self.tokens + new, min(2 * room, self.most))
        self.room = [part.new_zeros(*part.shape[:2], room, part.shape[3]) for part in _parts(keys, values, None)]
        for part, before in zip(self.room, old, strict=False):
            part[:, :, : self.tokens] = before[:, :, : self.tokens]

    def make_room(self, new: int, keys: Tensor, values: Tensor) -> None:
        """`reserve` for tokens that come by `step`."""
        self.reserve(new, keys, values)
        if self.tally is None:
            self.tally = Tally(keys.device)
            self.room[2][:, :, self.tokens :] = False
        self.tally.promise(1)

    def step(self, keys: Tensor, values: Tensor, skip: Tensor | None, places: Tensor | None = None) -> None:
        """Hold tokens on a GPU, without waiting for it, behind those held, or from places[1] on; `tokens` stays.

        Nothing is skipped where places tell.
        """
        assert self.tally is not None
        first = self.tokens if places is None else 0
        for room, numbers in zip(self.room, (keys, values), strict=False):
            cuda.put(room, first, numbers, self.tally.counts, None if places is None else places[1:])
        if places is None:
            new = slice(first, first + keys.shape[2])
            self.room[2][:, 0, new, 0] = False if skip is None else skip

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens; where steps write, nothing is skipped beyond them."""
        if self.tally is not None and tokens < self.tokens:
            self.room[2][:, :, tokens:] = False
        self.tokens = tokens

    def select(self, rows: Tensor) -> None:
        """Keep the sequences named by `rows` [n] int64, in that order, repeats allowed."""
        self.room = [part[rows] for part in self.room]


def _parts(keys: Tensor, values: Tensor, skip: Tensor | None) -> list[Tensor]:
    skip = keys.new_zeros(len(keys), keys.shape[2], dtype=torch.bool) if skip is None else skip
    return [keys, values, skip[:, None, :, None]]
