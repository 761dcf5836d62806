"""Pages of packed blocks. A block is 64 tokens of one sequence; it is written once and never changes.

A page has space for some blocks, its slots. Pages are allocated as a sequence grows and never moved, so appending copies
nothing that is already stored.
"""

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer, QuantizedTensor, Scheme
from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.cuda.pack import pack_into
from narrowkv.codec.packing import PLANES, pack, plane_bytes, unpack
from narrowkv.codec.scheme_parts import BLOCK

OUTLIER_BYTES = 4  # a 16-bit value and a 16-bit index
Shape = tuple[int, int, int]  # batch, kv_heads, head_dim
Dtypes = tuple[torch.dtype, torch.dtype]  # of keys and of values
GROWTH = 16  # while decoding, a new page has one more sixteenth of what is stored


def is_channel_major(scheme: Scheme, keys: bool) -> bool:
    """Whether neighboring codes are neighboring tokens: of a channel of keys, or of a byte of streams."""
    return keys or scheme.datatype == "trellis"


def to_blocks(encoded: QuantizedTensor) -> QuantizedTensor:
    """Cut tokens into blocks: [batch, kv_heads, n * 64, head_dim] -> [n * batch, kv_heads, 64, head_dim], block-major.

    Outliers are sorted. A GPU is not waited for.
    """
    batch, heads, tokens, positions = encoded.outlier_shape
    count = tokens // BLOCK

    def cut(part: Tensor) -> Tensor:
        blocks = part.unflatten(2, (count, -1))  # [batch, heads, n, 64 or groups, dim]
        return blocks.permute(2, 0, 1, 3, 4).flatten(0, 1)

    codes, ranges = cut(encoded.codes), {name: cut(part) for name, part in encoded.ranges.items()}
    if encoded.outlier_index is None or encoded.outlier_values is None:
        return QuantizedTensor(codes, ranges)
    index, size = encoded.outlier_index, BLOCK * positions
    if count > 1:
        row_and_head, block = index // size // count, index // size % count
        index = (block * batch * heads + row_and_head) * size + index % size
    index, order = index.sort()
    return QuantizedTensor(codes, ranges, index, encoded.outlier_values[order], encoded.outlier_positions)


def from_blocks(blocks: Tensor, batch: int) -> Tensor:
    """Inverse of `to_blocks` for dequantized elements: [n * batch, kv_heads, 64, d] -> [batch, kv_heads, n * 64, d]."""
    return blocks.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4).flatten(2, 3)


class PackedTensor:
    """The keys, or the values, of a page.

    planes: channel-major [slots, kv_heads, codes, bytes of 64 codes], so that neighboring codes are neighboring tokens of
        a channel; or token-major [slots, kv_heads, 64, bytes of the codes of a token]. One tensor per plane of bits. Exact
        elements lie as they come: [slots, kv_heads, 64, head_dim].
    ranges: [slots, ...] stored online ranges, by name, as `Scheme.range_forms` has it for 64 tokens.
    outlier_values, outlier_index: [capacity] 16-bit value and index within a block and head (`QuantizedTensor.outlier_shape`),
        sorted by slot, head and index; those of slot s and head h begin at outlier_offsets[s * kv_heads + h].
    outliers_used: how many there are.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        bits: int,
        channel_major: bool,
        planes: list[Tensor],
        ranges: dict[str, Tensor] | None = None,
        outliers: tuple[Tensor, Tensor, Tensor] | None = None,
    ):
        """shape: kv_heads, 64, codes, or coefficients that outliers replace where these are not codes. outliers: values,
        index and offsets, all of them in use.
        """
        self.shape = shape
        self.bits = bits
        self.channel_major = channel_major
        self.planes = planes
        self.ranges = ranges or {}
        self.outlier_values: Tensor | None
        self.outlier_index: Tensor | None
        self.outlier_offsets: Tensor | None
        self.outlier_values, self.outlier_index, self.outlier_offsets = outliers or (None, None, None)
        self.outliers_used = len(outliers[0]) if outliers else 0
        self._pending: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def allocate(
        cls, quantizer: AnyQuantizer, slots: int, like: QuantizedTensor, *, keys: bool, outlier_capacity: int
    ) -> "PackedTensor":
        """Memory for `slots` blocks such as those of `like`, not yet written, and for `outlier_capacity` outliers."""
        heads, dim = like.codes.shape[1], like.codes.shape[3]
        device, bits = like.codes.device, quantizer.scheme.code_bits
        channel_major = is_channel_major(quantizer.scheme, keys)
        rows, length = (dim, BLOCK) if channel_major else (BLOCK, dim)
        if bits == 16:
            planes = [torch.empty(slots, heads, BLOCK, dim, dtype=like.codes.dtype, device=device)]
        else:
            planes = [
                torch.empty(slots, heads, rows, plane_bytes(length, plane), dtype=torch.uint8, device=device)
                for plane in PLANES[bits]
            ]
        ranges = {
            name: torch.empty(slots, *part.shape[1:], dtype=part.dtype, device=device) for name, part in like.ranges.items()
        }
        outliers = None
        if like.outlier_values is not None:
            outliers = (
                torch.empty(outlier_capacity, dtype=like.outlier_values.dtype, device=device),
                torch.empty(outlier_capacity, dtype=torch.int16, device=device),
                torch.zeros(slots * heads + 1, dtype=torch.int32, device=device),
            )
        side = cls((heads, BLOCK, like.outlier_shape[3]), bits, channel_major, planes, ranges, outliers)
        side.outliers_used = 0
        return side

    def outliers(self) -> list[Tensor]:
        """The tensors of outliers."""
        parts = (self.outlier_values, self.outlier_index, self.outlier_offsets)
        return [part for part in parts if part is not None]

    def put(self, slot: int, blocks: QuantizedTensor) -> None:
        """Write blocks [n, kv_heads, 64, head_dim], like those of `to_blocks`, into slots slot..slot+n; outliers wait for
        `commit`.

        Nothing here, nor in `commit`, waits for a GPU.
        """
        stop = slot + blocks.codes.shape[0]
        self._pack([plane[slot:stop] for plane in self.planes], blocks.codes)
        for name, stored in self.ranges.items():
            stored[slot:stop] = blocks.ranges[name]
        if self.outlier_offsets is not None:
            assert blocks.outlier_index is not None and blocks.outlier_values is not None
            heads, size = self.shape[0], self.shape[1] * self.shape[2]
            borders = torch.arange(1, (stop - slot) * heads + 1, device=blocks.codes.device, dtype=torch.int64) * size
            ends = (torch.searchsorted(blocks.outlier_index, borders) + self.outliers_used).int()
            self.outlier_offsets[slot * heads + 1 : stop * heads + 1] = ends
            self.outlier_offsets[stop * heads + 1 :] = ends[-1]
            self._pending.append(((blocks.outlier_index % size).short(), blocks.outlier_values))
            self.outliers_used += len(blocks.outlier_index)

    def _pack(self, planes: list[Tensor], codes: Tensor) -> None:
        """Write codes of blocks into the planes of their slots."""
        rows = codes.transpose(2, 3) if self.channel_major and self.bits < 16 else codes
        if self.bits < 16 and cuda.runs_on(codes.device):
            return pack_into(planes, rows, self.bits)
        for plane, packed in zip(planes, [rows] if self.bits == 16 else pack(rows, self.bits), strict=True):
            plane.copy_(packed)

    def commit(self) -> None:
        """Move the outliers of all `put` since the last commit to their slot; a page made without space is fitted."""
        if not self._pending:
            return
        index, values = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        assert self.outlier_values is not None and self.outlier_index is not None
        if len(self.outlier_values) == 0:
            self.outlier_index, self.outlier_values = index, values
        else:
            start = self.outliers_used - len(index)
            self.outlier_index[start : self.outliers_used] = index
            self.outlier_values[start : self.outliers_used] = values

    def take(self, slots: Tensor) -> QuantizedTensor:
        """The blocks in `slots` [n] int64, as codes [n, kv_heads, 64, head_dim]."""
        planes = [plane[slots] for plane in self.planes]
        codes = planes[0] if self.bits == 16 else unpack(planes, self.bits)
        if self.channel_major and self.bits < 16:
            codes = codes.transpose(2, 3).contiguous()
        ranges = {name: part[slots] for name, part in self.ranges.items()}
        if self.outlier_offsets is None or self.outlier_index is None or self.outlier_values is None:
            return QuantizedTensor(codes, ranges)
        heads, tokens, positions = self.shape
        offsets = self.outlier_offsets.long()
        begin = offsets[:-1].view(-1, heads)[slots].flatten()
        count = offsets[1:].view(-1, heads)[slots].flatten() - begin
        group = torch.repeat_interleave(torch.arange(len(count), device=count.device, dtype=torch.int64), count)
        position = (
            torch.arange(len(group), device=count.device, dtype=torch.int64) + (begin - (count.cumsum(0) - count))[group]
        )
        index = group * (tokens * positions) + self.outlier_index[position].long()
        return QuantizedTensor(codes, ranges, index, self.outlier_values[position], positions)


class Page:
    """Slots for blocks of keys and of values, filled from the front."""

    def __init__(self, slots: int, keys: PackedTensor, values: PackedTensor):
        self.slots = slots
        self.used = 0
        self.keys = keys
        self.values = values

    @classmethod
    def allocate(
        cls,
        quantizers: tuple[AnyQuantizer, AnyQuantizer],
        slots: int,
        keys: QuantizedTensor,
        values: QuantizedTensor,
        *,
        exactly: bool,
    ) -> "Page":
        """Memory for `slots` blocks such as those of keys and values, not yet written; for about as many outliers as they have
        too, unless exactly those are to fit that come before the first `commit`.
        """
        sides = []
        for quantizer, blocks in zip(quantizers, (keys, values), strict=True):
            found = len(blocks.outlier_index) if blocks.outlier_index is not None else 0
            outlier_capacity = 0 if exactly else (found + found // 8 + 1) * slots // keys.codes.shape[0]
            sides.append(
                PackedTensor.allocate(quantizer, slots, blocks, keys=blocks is keys, outlier_capacity=outlier_capacity)
            )
        return cls(slots, sides[0], sides[1])

    @classmethod
    def to_grow(
        cls,
        quantizers: tuple[AnyQuantizer, AnyQuantizer],
        columns: int,
        batch: int,
        keys: QuantizedTensor,
        values: QuantizedTensor,
    ) -> "Page":
        """Memory for columns that come singly behind this many others; keys and values are the first."""
        capacity = max(columns // GROWTH, 1)
        return cls.allocate(quantizers, capacity * batch, keys, values, exactly=capacity == 1)

    @property
    def device(self) -> torch.device:
        return self.keys.planes[0].device

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        sides = (self.keys, self.values)
        return [part for side in sides for part in (*side.planes, *side.ranges.values(), *side.outliers())]

    def __deepcopy__(self, memo: dict) -> "Page":
        """Blocks never change, so a copy shares them; neither may write into the free slots any more."""
        self.slots = self.used
        return self

    def fits(self, keys: QuantizedTensor, values: QuantizedTensor) -> bool:
        """Whether these blocks find free slots and space for their outliers."""
        free = self.slots - self.used >= keys.codes.shape[0]
        return free and all(
            side.outlier_values is None
            or side.outliers_used + len(blocks.outlier_index if blocks.outlier_index is not None else ())
            <= len(side.outlier_values)
            for side, blocks in ((self.keys, keys), (self.values, values))
        )

    def put(self, keys: QuantizedTensor, values: QuantizedTensor) -> range:
        """Write blocks of keys and values into the next slots; returns which."""
        start = self.used
        self.keys.put(start, keys)
        self.values.put(start, values)
        self.used += keys.codes.shape[0]
        return range(start, self.used)

    def commit(self) -> None:
        self.keys.commit()
        self.values.commit()


@dataclass(frozen=True, eq=False)
class BlockTableEntry:
    """One block of every sequence: where it lies, and how many of its tokens count; known by its serial number."""

    page: Page
    slots: Tensor  # [batch] int64, on the CPU
    count: int
    serial: int = field(init=False, default_factory=itertools.count().__next__)


def gather(quantizers: tuple[AnyQuantizer, AnyQuantizer], columns: list[BlockTableEntry]) -> Page:
    """The blocks of all columns, one column after the other, in a page without free slots. Codes are moved, not touched."""
    page: Page | None = None
    for column in columns:
        blocks = (column.page.keys.take(column.slots), column.page.values.take(column.slots))
        if page is None:
            slots = sum(len(column.slots) for column in columns)
            sides = [
                PackedTensor.allocate(quantizer, slots, like, keys=keys, outlier_capacity=0)
                for quantizer, like, keys in zip(quantizers, blocks, (True, False), strict=True)
            ]
            page = Page(slots, sides[0], sides[1])
        page.put(*blocks)
    assert page is not None
    page.commit()
    return page


def compact(quantizers: tuple[AnyQuantizer, AnyQuantizer], columns: list[BlockTableEntry]) -> list[BlockTableEntry]:
    """The same columns in a page of their own, so that those that they lay in can go."""
    page = gather(quantizers, columns)
    slots = torch.arange(page.slots, dtype=torch.int64, device="cpu").view(len(columns), -1)
    return [replace(column, page=page, slots=part.clone()) for column, part in zip(columns, slots, strict=True)]
