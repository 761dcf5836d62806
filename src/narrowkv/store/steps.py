"""Steps: a few tokens stored on a GPU without waiting for it.

What the host does (`make_room`, `advance`, `seal`) looks at no number; what the device does (`write`) can be captured in a
CUDA graph, which is told by numbers on the device where to write: places [2] int32, in the tail and in the window.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from narrowkv.codec import cuda
from narrowkv.codec.room import AHEAD
from narrowkv.codec.tally import Tally
from narrowkv.store.page import BLOCK
from narrowkv.store.tail import Tail

if TYPE_CHECKING:
    from narrowkv.store.layer import LayerStore


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


def write(store: "LayerStore", keys: Tensor, values: Tensor, skip: Tensor | None = None, places: Tensor | None = None) -> None:
    """Store new tokens where `make_room` found room: behind those held, or at `places`. skip: [batch, new], if places are not
    given.
    """
    if store.windowed:
        store.recent.step(keys, values, skip, places)
    elif store.tail:
        store.tail.step((keys, skip), (values, skip), places)


def advance(store: "LayerStore", new: int) -> None:
    """Count tokens that were, or will be, written."""
    if store.windowed:
        store.recent.tokens += new
    elif store.tail:
        store.tail.tokens += new


def seal(store: "LayerStore") -> None:
    """Seal the tail if it is full; how many outliers it has is waited for."""
    if store.tail and store.tail.tokens == BLOCK:
        store.seal_tail().commit()


def tallies(store: "LayerStore") -> list[Tally]:
    """Where steps count what they find."""
    found = [room.tally for room in store.tail.rooms] if store.tail else []
    return [tally for tally in (*found, store.recent.tally) if tally is not None]
