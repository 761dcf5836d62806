"""Window: the newest tokens, exact, in room that is written in place."""

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]


class Window:
    """Keys and values [batch, kv_heads, tokens, head_dim], and which tokens are skipped [batch, tokens] bool.

    most: how many tokens it may come to hold; room grows to that and no further.
    """

    def __init__(self, most: int):
        self.most = most
        self.tokens = 0
        self._room: list[Tensor] = []  # keys, values, and what is skipped as [batch, 1, room, 1]

    def tensors(self) -> list[Tensor]:
        """All tensors that are held."""
        return self._room

    def held(self) -> Parts:
        """Keys, values and what is skipped, without a copy."""
        keys, values, skip = (part[:, :, : self.tokens] for part in self._room)
        return keys, values, skip[:, 0, :, 0]

    def oldest(self, count: int, keys: Tensor, values: Tensor, skip: Tensor | None) -> Parts:
        """The first `count` tokens of those held and of new ones that follow them."""
        parts = _parts(keys, values, skip)
        if self._room:
            parts = [
                torch.cat([old[:, :, : self.tokens], new], dim=2) if count > self.tokens else old
                for old, new in zip(self._room, parts, strict=True)
            ]
        first = [part[:, :, :count] for part in parts]
        return first[0], first[1], first[2][:, 0, :, 0]

    def shift(self, count: int, keys: Tensor, values: Tensor, skip: Tensor | None) -> None:
        """Let go of so many of the `oldest` tokens, and hold the others."""
        new = _parts(keys, values, skip)
        kept = max(self.tokens - count, 0)
        come = self.tokens + keys.shape[2] - count - kept
        old, room = self._room, self._room[0].shape[2] if self._room else 0
        if kept + come > room or not old:
            room = max(kept + come, min(2 * room, self.most))
            self._room = [part.new_zeros(*part.shape[:2], room, part.shape[3]) for part in new]
        if kept and (count or old is not self._room):
            for part, before in zip(self._room, old, strict=True):
                part[:, :, :kept] = before[:, :, self.tokens - kept : self.tokens].clone()
        for part, fresh in zip(self._room, new, strict=True):
            part[:, :, kept : kept + come] = fresh[:, :, fresh.shape[2] - come :]
        self.tokens = kept + come

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        self.tokens = tokens

    def select(self, rows: Tensor) -> None:
        """Keep the sequences named by `rows` [n] int64, in that order, repeats allowed."""
        self._room = [part[rows] for part in self._room]


def _parts(keys: Tensor, values: Tensor, skip: Tensor | None) -> list[Tensor]:
    skip = keys.new_zeros(len(keys), keys.shape[2], dtype=torch.bool) if skip is None else skip
    return [keys, values, skip[:, None, :, None]]
