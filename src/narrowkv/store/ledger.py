"""What is kept of each token once for all layers: its position, or the angles by which its keys are turned."""

import torch
from torch import Tensor


class Ledger:
    """One entry for each token of each sequence, growing; integers are held as int32 (a position: 4 bytes a token)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all entries."""
        self._held: Tensor | None = None  # [batch, room, ...]
        self.length = 0

    def tensors(self) -> list[Tensor]:
        return [] if self._held is None else [self._held]

    def append(self, entries: Tensor) -> None:
        """entries: [batch, new, ...], integer or floating point."""
        new = entries.shape[1]
        room = 0 if self._held is None else self._held.shape[1]
        if self.length + new > room:
            dtype = entries.dtype if entries.is_floating_point() else torch.int32
            shape = (entries.shape[0], self.length + new + self.length // 16, *entries.shape[2:])
            wider = entries.new_empty(shape, dtype=dtype)
            if self._held is not None:
                wider[:, : self.length] = self._held[:, : self.length]
            self._held = wider
        assert self._held is not None
        self._held[:, self.length : self.length + new] = entries
        self.length += new

    def read(self, stop: int) -> Tensor:
        """Entries of the first `stop` tokens: [batch, stop, ...]."""
        assert self._held is not None
        return self._held[:, :stop]

    def select(self, rows: Tensor) -> None:
        """Keep these sequences [n] int64."""
        if self._held is not None:
            self._held = self._held[rows.to(self._held.device)]

    def crop(self, length: int) -> None:
        """Drop the tokens from `length` on."""
        self.length = min(self.length, length)
