"""Positions of the stored tokens, one record for all layers of a cache."""

import torch
from torch import Tensor


class Ledger:
    """The position of every stored token: int32, 4 bytes a token whatever the number of layers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all positions."""
        self._held: Tensor | None = None  # [batch, room] int32
        self.length = 0

    def tensors(self) -> list[Tensor]:
        return [] if self._held is None else [self._held]

    def append(self, positions: Tensor) -> None:
        """positions: [batch, new] integer."""
        new = positions.shape[1]
        room = 0 if self._held is None else self._held.shape[1]
        if self.length + new > room:
            wider = positions.new_empty(positions.shape[0], self.length + new + self.length // 16, dtype=torch.int32)
            if self._held is not None:
                wider[:, : self.length] = self._held[:, : self.length]
            self._held = wider
        assert self._held is not None
        self._held[:, self.length : self.length + new] = positions
        self.length += new

    def read(self, stop: int) -> Tensor:
        """Positions of the first `stop` tokens: [batch, stop] int32."""
        assert self._held is not None
        return self._held[:, :stop]

    def select(self, rows: Tensor) -> None:
        """Keep these sequences [n] int64."""
        if self._held is not None:
            self._held = self._held[rows.to(self._held.device)]

    def crop(self, length: int) -> None:
        """Drop the tokens from `length` on."""
        self.length = min(self.length, length)
