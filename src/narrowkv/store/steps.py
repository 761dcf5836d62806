"""Steps: a few tokens stored on a GPU without waiting for it.

What the host does (`make_room`, `advance`, `seal`) looks at no number; what the device does (`write`) can be captured in a
CUDA graph, which is told by numbers on the device where to write: places [2] int32, in the tail and in the window.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowkv.codec import cuda
from narrowkv.codec.room import AHEAD
from narrowkv.codec.tally import Tally
from narrowkv.store.tail import Tail

if TYPE_CHECKING:
    from narrowkv.store.layer import LayerStore

MOST_UNDER_WAY = 4


def make_room(store: "LayerStore", keys: Tensor, values: Tensor) -> bool:
    """Whether new tokens [batch, kv_heads, new, head_dim], such as these, can be stored by a step; if so, they find room.

    Those that leave the window for them are encoded, and a full tail is sealed, before.
    """
    new = keys.shape[2]
    if new > AHEAD or store.shape is None or not cuda.runs_on(keys.device) or not store.sinks_seen():
        return False
    if not store.windowed:
        store.tail = store.tail or Tail(store.quantizers, keys, values)
        return store.tail.make_room(new)
    leaving = store.leaving(new)
    if leaving + max(store.ahead) > store.recent.tokens:
        return False
    if leaving:
        store.release(leaving)
    store.recent.make_room(new, keys, values)
    return True


def write(
    store: "LayerStore",
    keys: Tensor,
    values: Tensor,
    skip: Tensor | None = None,
    places: Tensor | None = None,
    of_keys: Tensor | None = None,
) -> None:
    """Store new tokens where `make_room` found room: behind those held, or at `places`. skip: [batch, new], if places are not
    given. of_keys: what is taken out of keys, where only the device knows where they are.
    """
    if store.windowed:
        store.recent.step(keys, values, skip, places)
    elif store.tail:
        if places is None:
            of_keys = store.bias.of_keys(store.first + store.packed, keys.shape[2])
        store.tail.step(*store.bias.taken_out((keys, skip), (values, skip), of_keys, store.schemes), places)


def advance(store: "LayerStore", new: int) -> None:
    """Count tokens that were, or will be, written."""
    if store.windowed:
        store.recent.tokens += new
    elif store.tail:
        store.tail.tokens += new


def seal(store: "LayerStore") -> None:
    """Seal the tail if it is full; how many outliers it has is waited for."""
    if store.tail and store.tail.is_full:
        store.seal_tail().commit()


@dataclass
class News:
    """Counts on their way from the device, so that the host learns of them without waiting."""

    under_way: deque[tuple[list[tuple[Tally, int]], Tensor, Any]] = field(default_factory=deque)

    def __deepcopy__(self, memo: dict) -> "News":
        """What is under way is for the original alone."""
        return News()

    def send(self, tallies: Iterable[Tally]) -> None:
        """Send off what is counted once all that was launched has run."""
        asked = [(tally, tally.promised) for tally in tallies]
        if not asked or len(self.under_way) == MOST_UNDER_WAY:
            return
        counts, arrived = torch.stack([tally.counts for tally, _ in asked]), None
        if counts.is_cuda:
            with torch.cuda.device_of(counts):
                counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True, device="cpu").copy_(
                    counts, non_blocking=True
                )
                arrived = torch.cuda.Event()
                arrived.record()
        self.under_way.append((asked, counts, arrived))

    def receive(self) -> None:
        """Let the host learn what has come. Raises ActivationError as `Tally.learn`."""
        while self.under_way and (self.under_way[0][2] is None or self.under_way[0][2].query()):
            asked, counts, _ = self.under_way.popleft()
            for (tally, promised), found in zip(asked, counts.tolist(), strict=True):
                tally.learn(found, promised)

    def settle(self, tallies: Iterable[Tally]) -> None:
        """Wait once, and let the host learn all."""
        asked = list(tallies)
        if asked:
            for tally, found in zip(asked, torch.stack([tally.counts for tally in asked]).tolist(), strict=True):
                tally.learn(found, tally.promised)


def tallies(store: "LayerStore") -> list[Tally]:
    """Where steps count what they find."""
    found = [room.tally for room in store.tail.rooms] if store.tail else []
    return [tally for tally in (*found, store.recent.tally) if tally is not None]
