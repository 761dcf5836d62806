"""Tally: what kernels on a GPU count, and what the host knows of it without waiting."""

from collections.abc import Sequence

import torch

from narrowkv.errors import ActivationError


class Tally:
    """Outliers found so far, and numbers that cannot be kept, counted on the device.

    counts: [2] int32, those two; kernels add to them. The host knows a bound, `most`: what it last read, and what was
    `promised` since. It reads (and waits) only where it must know, or learns from a copy that was under way.
    """

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(2, dtype=torch.int32, device=device)
        self.promised = 0  # over its whole life: what kernels were allowed to find
        self._known = 0
        self._settled = 0  # how much of `promised` is in what is known
        self._valid_from = 0

    @property
    def most(self) -> int:
        """How many outliers there are at most."""
        return self._known + self.promised - self._settled

    def promise(self, most: int) -> None:
        """Kernels that are launched from now on find so many outliers at most."""
        self.promised += most

    def exact(self) -> int:
        """How many outliers there are; waits for the device where it may have found some. Raises as `learn`."""
        if self.promised != self._settled:
            self.learn(self.counts.tolist(), self.promised)
        return self._known

    def learn(self, counts: Sequence[int], promised: int) -> None:
        """Take counts that were right when so much was promised; older ones than the last `put` are left alone.

        Raises ActivationError where numbers cannot be kept.
        """
        if promised < self._valid_from or promised < self._settled:
            return
        if counts[1]:
            raise ActivationError(
                "Keys or values contain NaN or infinity, or exceed the 16 bits in which ranges and outliers are kept; check "
                "the model's weights and dtype (float16 overflows), or use recipe fp16, and call cache.reset()."
            )
        self._known, self._settled = counts[0], promised

    def put(self, outliers: int) -> None:
        """Let it be so many from now on."""
        self.counts[0] = outliers
        self._known = outliers
        self.promised += 1  # so that copies under way are told apart
        self._settled = self._valid_from = self.promised
