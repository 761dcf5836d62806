"""Counter: what kernels on a GPU count, and what the host knows of it without waiting; News: how it comes to know."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from narrowkv.errors import ActivationError

MOST_UNDER_WAY = 4


class OutlierCounter:
    """Outliers found so far, and elements that cannot be stored, counted on the device.

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
        """Kernels that are launched from now on find this many outliers at most."""
        self.promised += most

    def exact(self) -> int:
        """How many outliers there are; waits for the device where it may have found some. Raises as `learn`."""
        if self.promised != self._settled:
            self.learn(self.counts.tolist(), self.promised)
        return self._known

    def learn(self, counts: Sequence[int], promised: int) -> None:
        """Take counts that were right when so much was promised; older ones than the last `put` are left alone.

        Raises ActivationError where elements cannot be stored.
        """
        if promised < self._valid_from or promised < self._settled:
            return
        if counts[1]:
            raise ActivationError(
                "Keys or values contain NaN or infinity, or exceed the 16 bits in which ranges and outliers are stored; check "
                "the model's weights and dtype (float16 overflows), or use recipe fp16, and call cache.reset()."
            )
        self._known, self._settled = counts[0], promised

    def put(self, outliers: int) -> None:
        """Let it be this many from now on."""
        self.counts[0] = outliers
        self._known = outliers
        self.promised += 1  # so that copies under way are distinguished
        self._settled = self._valid_from = self.promised


@dataclass
class CountReadback:
    """Counts on their way from the device, so that the host learns of them without waiting."""

    under_way: deque[tuple[list[tuple[OutlierCounter, int]], Tensor, Any]] = field(default_factory=deque)

    def __deepcopy__(self, memo: dict) -> "CountReadback":
        """What is under way is for the original alone."""
        return CountReadback()

    def send(self, counters: Iterable[OutlierCounter]) -> None:
        """Send off what is counted once all that was launched has run."""
        pending = [(counter, counter.promised) for counter in counters]
        if not pending or len(self.under_way) == MOST_UNDER_WAY:
            return
        counts, arrived = torch.stack([counter.counts for counter, _ in pending]), None
        if counts.is_cuda:
            with torch.cuda.device_of(counts):
                counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True, device="cpu").copy_(
                    counts, non_blocking=True
                )
                arrived = torch.cuda.Event()
                arrived.record()
        self.under_way.append((pending, counts, arrived))

    def receive(self) -> None:
        """Let the host learn what has come. Raises ActivationError as `OutlierCounter.learn`."""
        while self.under_way and (self.under_way[0][2] is None or self.under_way[0][2].query()):
            pending, counts, _ = self.under_way.popleft()
            for (counter, promised), found in zip(pending, counts.tolist(), strict=True):
                counter.learn(found, promised)

    def settle(self, counters: Iterable[OutlierCounter]) -> None:
        """Wait once, and let the host learn all."""
        pending = list(counters)
        if pending:
            for counter, found in zip(pending, torch.stack([counter.counts for counter in pending]).tolist(), strict=True):
                counter.learn(found, counter.promised)
