"""The forms for a GPU of what is done to every new token, written in Triton; plain torch where it is not installed."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from narrowkv.codec.room import Room
from narrowkv.codec.scheme import Scheme

NUMBERS = 1024  # that a program takes at a time, where it may choose


@functools.cache
def kernels() -> ModuleType | None:
    """The module of kernels; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("narrowkv.codec.triton_encode")


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on a device."""
    return device.type == "cuda" and kernels() is not None


def _room(n: int) -> int:
    """The smallest power of 2 that is not less than n."""
    return 1 << (n - 1).bit_length()


class Stepper(Protocol):
    """Encodes tokens one by one without waiting for the GPU; what does not fit 16 bits is told later, by the room's tally."""

    def most(self, batch: int, kv_heads: int, head_dim: int) -> int:
        """How many outliers a token has at most."""
        ...

    def step(self, room: Room, first: int, x: Tensor, skip: Tensor | None, places: Tensor | None) -> None:
        """Encode x [batch, kv_heads, tokens, head_dim] into room from the token `first` on, and places[0] after it."""
        ...


@dataclass(frozen=True)
class Encoder:
    """`Quantizer.encode` for one scheme and its tables (float32), for ranges that are fixed or those of a token.

    tail: how many outliers each end of a range has, by how many numbers share it. turned: what is done to numbers first.
    """

    SUPPORTS: ClassVar = (
        "datatype",
        "axis",
        "outliers",
        "hadamard",
        "smooth",
    )  # fields that need not be as by default

    scheme: Scheme
    boundaries: Tensor
    scale: Tensor | None
    zero: Tensor | None
    lower: Tensor | None
    upper: Tensor | None
    tail: Callable[[int], int]
    turned: Callable[[Tensor], Tensor] | None = None

    def most(self, batch: int, kv_heads: int, head_dim: int) -> int:
        """How many outliers a token has at most."""
        if not self.scheme.outliers:
            return 0
        if self.scheme.static:
            return batch * kv_heads * head_dim
        vectors, numbers = (1, kv_heads * head_dim) if self.scheme.axis == "token" else (kv_heads, head_dim)
        return batch * vectors * 2 * self.tail(numbers)

    def step(self, room: Room, first: int, x: Tensor, skip: Tensor | None, places: Tensor | None) -> None:
        """As of `Stepper`."""
        assert room.tally is not None
        self.launch(room, first, x, skip, room.tally.counts, places=places)

    def write(self, room: Room, first: int, x: Tensor, skip: Tensor | None) -> int | None:
        """Encode x [batch, kv_heads, tokens, head_dim] into room from the token `first` on.

        Returns how many outliers the room then holds, which the caller lets it count; None where something does not fit 16
        bits. This count is the one thing that the host waits for.
        """
        while True:  # until outliers find room
            free = 0 if room.outlier_index is None else len(room.outlier_index) - room.outliers
            counts = torch.zeros(2, dtype=torch.int32, device=x.device)
            self.launch(room, first, x, skip, counts, held=room.outliers)
            if not self.scheme.outliers and self.scheme.static:
                return 0
            found, unfit = counts.tolist()
            if unfit:
                return None
            if found <= free:
                return room.outliers + found
            room.reserve(found)

    def launch(
        self,
        room: Room,
        first: int,
        x: Tensor,
        skip: Tensor | None,
        counts: Tensor,
        *,
        held: int = 0,
        places: Tensor | None = None,
    ) -> None:
        """The same without waiting: counts [2] int32 are added to, by outliers found and numbers that do not fit.

        Outliers are written behind the first `held` and as many as were counted before.
        """
        module = kernels()
        assert module is not None
        x = x if self.turned is None else self.turned(x)
        x = x if x.stride(3) == 1 else x.contiguous()
        batch, heads, tokens, dim = x.shape
        together = self._together(heads, dim)
        numbers = together * dim
        index, values, other = room.outlier_index, room.outlier_values, counts
        if index is not None and values is not None:
            index, values = index[held:], values[held:]
        skip = None if skip is None else skip.contiguous().view(torch.uint8)
        fixed = (self.scale, self.zero, self.lower, self.upper)
        with torch.cuda.device_of(x):
            module.encode_tokens[(batch, tokens, -(-heads // together))](
                x, _or(skip, other), room.codes, _or(room.ranges.get("scale"), other), _or(room.ranges.get("zero"), other),
                _or(index, other), _or(values, other), counts, _or(places, other),
                self.boundaries, *(_or(part, other) for part in fixed),
                first, room.tokens, 0 if index is None else len(index), x.stride(0), x.stride(1), x.stride(2), tokens,
                HEADS=heads, DIM=dim, WIDE=_room(numbers), TOGETHER=together, FIXED=self.scheme.static,
                TAIL=self.tail(numbers), OUTLIERS=self.scheme.outliers > 0, SKIPS=skip is not None,
                PLACED=places is not None, BOUNDARIES=len(self.boundaries),
                enable_fp_fusion=False, num_warps=min(max(_room(numbers) // 512, 4), 16),
            )  # fmt: skip

    def _together(self, heads: int, dim: int) -> int:
        """How many heads a program takes: all that share a range, or a few whose ranges are fixed."""
        if self.scheme.axis == "token":
            return heads
        return min(max(NUMBERS // dim, 1), heads) if self.scheme.static else 1


class Copier:
    """Numbers that stay exact, written as they are."""

    def most(self, batch: int, kv_heads: int, head_dim: int) -> int:
        """How many outliers a token has at most."""
        return 0

    def step(self, room: Room, first: int, x: Tensor, skip: Tensor | None, places: Tensor | None) -> None:
        """As of `Stepper`."""
        assert room.tally is not None
        put(room.codes, first, x, room.tally.counts, places)


def put(room: Tensor, first: int, x: Tensor, counts: Tensor, places: Tensor | None) -> None:
    """Write x [batch, kv_heads, tokens, head_dim] into room from the token `first` on, and places[0] after it.

    Adds to counts[1] how many numbers are NaN or infinite.
    """
    module = kernels()
    assert module is not None
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, tokens, dim = x.shape
    with torch.cuda.device_of(x):
        module.put_tokens[(batch, tokens, heads)](
            x, room, counts, _or(places, counts), first, room.shape[2], *x.stride()[:3],
            HEADS=heads, DIM=dim, WIDE=_room(dim), PLACED=places is not None,
        )  # fmt: skip


def _or(part: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for what is not there and never read."""
    return other if part is None else part


def sent(numbers: Any, device: torch.device) -> Tensor:
    """Whole numbers, in lists, as int32 on a device, without waiting for it."""
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda", device="cpu").to(
        device, non_blocking=True
    )
