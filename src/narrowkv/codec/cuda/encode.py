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

from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.scheme import Scheme

ELEMENTS = 1024  # that a program takes at a time, where it may choose


@functools.cache
def kernels() -> ModuleType | None:
    """The module of kernels; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("narrowkv.codec.cuda.kernels.encode")


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on a device."""
    return device.type == "cuda" and kernels() is not None


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is not less than n."""
    return 1 << (n - 1).bit_length()


class TokenEncoder(Protocol):
    """Encodes tokens one by one without waiting for the GPU; what does not fit 16 bits is reported later, by the buffer's
    counter.
    """

    def most(self, batch: int, kv_heads: int, head_dim: int) -> int:
        """How many outliers a token has at most."""
        ...

    def step(self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None, offsets: Tensor | None) -> None:
        """Encode x [batch, kv_heads, tokens, head_dim] into the buffer from the token `first` on, and offsets[0] after it."""
        ...


@dataclass(frozen=True)
class Encoder:
    """`Quantizer.encode` for one scheme and its tables (float32), for ranges that are fixed or those of a token.

    tail: how many outliers each end of a range has, by how many elements share it. rotated: what is done to elements first.
    """

    SUPPORTS: ClassVar = (
        "datatype",
        "strategy",
        "outliers",
        "hadamard",
        "smooth_alpha",
    )  # settings of a scheme that need not be as by default

    scheme: Scheme
    boundaries: Tensor
    scale: Tensor | None
    zero: Tensor | None
    lower: Tensor | None
    upper: Tensor | None
    tail: Callable[[int], int]
    rotated: Callable[[Tensor], Tensor] | None = None

    def most(self, batch: int, kv_heads: int, head_dim: int) -> int:
        """How many outliers a token has at most."""
        if not self.scheme.outliers.fraction:
            return 0
        if self.scheme.static:
            return batch * kv_heads * head_dim
        vectors, elements = (1, kv_heads * head_dim) if self.scheme.strategy == "token" else (kv_heads, head_dim)
        return batch * vectors * 2 * self.tail(elements)

    def step(self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None, offsets: Tensor | None) -> None:
        """Like those of `TokenEncoder`."""
        assert buffer.counter is not None
        self.launch(buffer, first, x, skip, buffer.counter.counts, offsets=offsets)

    def write(self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None) -> int | None:
        """Encode x [batch, kv_heads, tokens, head_dim] into the buffer from the token `first` on.

        Returns how many outliers the buffer then stores, which the caller lets it count; None where something does not fit 16
        bits. This count is the one thing that the host waits for.
        """
        while True:  # until outliers fit
            free = 0 if buffer.outlier_index is None else len(buffer.outlier_index) - buffer.outliers
            counts = torch.zeros(2, dtype=torch.int32, device=x.device)
            self.launch(buffer, first, x, skip, counts, stored=buffer.outliers)
            if not self.scheme.outliers.fraction and self.scheme.static:
                return 0
            found, overflow = counts.tolist()
            if overflow:
                return None
            if found <= free:
                return buffer.outliers + found
            buffer.reserve(found)

    def launch(
        self,
        buffer: EncodeBuffer,
        first: int,
        x: Tensor,
        skip: Tensor | None,
        counts: Tensor,
        *,
        stored: int = 0,
        offsets: Tensor | None = None,
    ) -> None:
        """The same without waiting: counts [2] int32 are added to, by outliers found and elements that do not fit.

        Outliers are written behind the first `stored` and as many as were counted before.
        """
        module = kernels()
        assert module is not None
        x = x if self.rotated is None else self.rotated(x)
        x = x if x.stride(3) == 1 else x.contiguous()
        batch, heads, tokens, dim = x.shape
        heads_per_program = self._heads_per_program(heads, dim)
        elements = heads_per_program * dim
        index, values, other = buffer.outlier_index, buffer.outlier_values, counts
        if index is not None and values is not None:
            index, values = index[stored:], values[stored:]
        skip = None if skip is None else skip.contiguous().view(torch.uint8)
        fixed = (self.scale, self.zero, self.lower, self.upper)
        with torch.cuda.device_of(x):
            module.encode_tokens[(batch, tokens, -(-heads // heads_per_program))](
                x, _or(skip, other), buffer.codes, _or(buffer.ranges.get("scale"), other),
                _or(buffer.ranges.get("zero"), other),
                _or(index, other), _or(values, other), counts, _or(offsets, other),
                self.boundaries, *(_or(part, other) for part in fixed),
                first, buffer.tokens, 0 if index is None else len(index), x.stride(0), x.stride(1), x.stride(2), tokens,
                HEADS=heads, DIM=dim, WIDE=_power_of_2(elements), HEADS_PER_PROGRAM=heads_per_program,
                FIXED=self.scheme.static,
                TAIL=self.tail(elements), OUTLIERS=self.scheme.outliers.fraction > 0, SKIPS=skip is not None,
                HAS_OFFSETS=offsets is not None, BOUNDARIES=len(self.boundaries),
                enable_fp_fusion=False, num_warps=min(max(_power_of_2(elements) // 512, 4), 16),
            )  # fmt: skip

    def _heads_per_program(self, heads: int, dim: int) -> int:
        """How many heads a program takes: all that share a range, or a few whose ranges are fixed."""
        if self.scheme.strategy == "token":
            return heads
        return min(max(ELEMENTS // dim, 1), heads) if self.scheme.static else 1


class IdentityEncoder:
    """Elements that stay exact, written as they are."""

    def most(self, batch: int, kv_heads: int, head_dim: int) -> int:
        """How many outliers a token has at most."""
        return 0

    def step(self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None, offsets: Tensor | None) -> None:
        """Like those of `TokenEncoder`."""
        assert buffer.counter is not None
        put(buffer.codes, first, x, buffer.counter.counts, offsets)


def put(buffer: Tensor, first: int, x: Tensor, counts: Tensor, offsets: Tensor | None) -> None:
    """Write x [batch, kv_heads, tokens, head_dim] into the buffer from the token `first` on, and offsets[0] after it.

    Adds to counts[1] how many elements are NaN or infinite.
    """
    module = kernels()
    assert module is not None
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, tokens, dim = x.shape
    with torch.cuda.device_of(x):
        module.put_tokens[(batch, tokens, heads)](
            x, buffer, counts, _or(offsets, counts), first, buffer.shape[2], *x.stride()[:3],
            HEADS=heads, DIM=dim, WIDE=_power_of_2(dim), HAS_OFFSETS=offsets is not None,
        )  # fmt: skip


def _or(part: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for what is not there and never read."""
    return other if part is None else part


def to_device_async(elements: Any, device: torch.device) -> Tensor:
    """Integers, in lists, as int32 on a device, without waiting for it."""
    return torch.tensor(elements, dtype=torch.int32, pin_memory=device.type == "cuda", device="cpu").to(
        device, non_blocking=True
    )
