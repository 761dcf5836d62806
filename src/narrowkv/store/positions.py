"""What is stored of each token once for all layers: its position, or the angles by which its keys are rotated."""

import torch
from torch import Tensor

from narrowkv.codec.scheme_parts import BLOCK
from narrowkv.errors import CacheUseError


class PositionBuffer:
    """One entry for each token of each sequence, growing; integers are stored as int32 (a position: 4 bytes a token)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Remove all entries."""
        self._storage: Tensor | None = None  # [batch, capacity, ...], of the tokens from `first` on
        self.length = 0
        self.first = 0
        self._starts: dict[tuple[int, int], Tensor | None] = {}  # as `starts` found them, until something changes

    def tensors(self) -> list[Tensor]:
        return [] if self._storage is None else [self._storage]

    def append(self, entries: Tensor) -> None:
        """entries: [batch, new, ...], integer or floating point."""
        new, stored = entries.shape[1], self.length - self.first
        self.reserve(new, entries)
        self.buffer[:, stored : stored + new] = entries
        self.length += new
        self._starts.clear()

    def reserve(self, new: int, like: Tensor) -> None:
        """Make sure that this many more entries, such as those of `like`, fit; raises CacheUseError for another form."""
        if self._storage is not None and self._storage.shape[2:] != like.shape[2:]:
            raise CacheUseError("The cache has angles of another form than the model's; call cache.reset().")
        stored = self.length - self.first
        if self._storage is None or stored + new > self._storage.shape[1]:
            self._resize(like, stored + new + stored // 16)

    def step(self, entries: Tensor, offset: Tensor) -> None:
        """Write entries [1 or batch, 1, ...] to offset `offset` [1] int64 of the buffer, on the device; `length` stays."""
        entries = entries.to(self.buffer.dtype).expand(len(self.buffer), *entries.shape[1:])
        self.buffer.index_copy_(1, offset, entries)
        self._starts.clear()

    @property
    def buffer(self) -> Tensor:
        """Entries of the tokens from `first` on, and space for more: [batch, capacity, ...]."""
        assert self._storage is not None
        return self._storage

    def _resize(self, like: Tensor, buffer: int) -> None:
        stored = self.length - self.first
        dtype = like.dtype if like.is_floating_point() else torch.int32
        resized = like.new_empty((like.shape[0], buffer, *like.shape[2:]), dtype=dtype)
        if self._storage is not None:
            resized[:, :stored] = self._storage[:, :stored]
        self._storage = resized

    def read(self, start: int, stop: int) -> Tensor:
        """Entries of the tokens from `start` to before `stop`: [batch, stop - start, ...]."""
        assert start >= self.first
        return self.buffer[:, start - self.first : stop - self.first]

    def starts(self, start: int, stop: int) -> Tensor | None:
        """The position of every 64th token from `start` to before `stop`, [batch, blocks], if those between follow it.

        None where they do not. Computed once in a step, for all layers.
        """
        if (start, stop) not in self._starts:
            positions = self.read(start, stop)
            blocks = positions[:, ::BLOCK]
            after = torch.arange(stop - start, device=positions.device, dtype=torch.int32) % BLOCK
            follow = torch.equal(blocks.repeat_interleave(BLOCK, dim=1)[:, : stop - start] + after, positions)
            self._starts[start, stop] = blocks if follow else None
        return self._starts[start, stop]

    def evict(self, before: int) -> None:
        """Let go of tokens older than the token `before`, once they are half of what is stored."""
        if self._storage is None or 2 * (before - self.first) <= self.length - self.first:
            return
        self._storage = self._storage[:, before - self.first :]
        self.first = before
        self._resize(self._storage, self.length - self.first)
        self._starts.clear()

    def select(self, rows: Tensor) -> None:
        """Keep these sequences [n] int64."""
        if self._storage is not None:
            self._storage = self._storage[rows.to(self._storage.device)]
            self._starts.clear()

    def crop(self, length: int) -> None:
        """Drop the tokens from `length` on."""
        self.length = min(self.length, length)
        self._starts.clear()
