"""Pages of an inference engine's own memory: where streams, outliers and the exact first token of 128 tokens lie in bytes.

A page holds two blocks of 64 tokens of one sequence, keys and values of all heads. Tokens are written as they come, each into
its column of the streams, so that no tail is open anywhere else; a block begins anew whenever its first token is written, and
tokens written again (rejected drafts) replace what was there. A page means the same wherever it lies: engines share it between
sequences, and copy it as bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from narrowkv.codec import QuantizedTensor, TrellisQuantizer
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.frames import FRAME
from narrowkv.codec.outlier_budget import block_budget
from narrowkv.codec.ranges import require_finite
from narrowkv.codec.scheme_parts import BLOCK
from narrowkv.errors import RecipeError
from narrowkv.store.plans import Plans
from narrowkv.store.runs import BLOCKS, PAGE, RunGroup

TILE = 16  # blocks that are dequantized at a time


class RotaryEmbedding(Protocol):
    """A rotary embedding of fixed frequencies, as `attention.rope` has it."""

    def unrotate(self, x: Tensor, rope_state: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SideLayout:
    """Where the keys, or the values, of a block lie, in bytes from where it begins.

    streams: [kv_heads, stream_bytes, 64] uint8. offsets: [kv_heads + 1] int32, where the outliers of each head begin among
    those of the block. values, index: [kv_heads * budget] float16 and uint16, `token * coefficients + coefficient`.
    """

    streams: int
    stream_bytes: int
    offsets: int
    values: int
    index: int
    budget: int  # outliers of a head
    coefficients: int  # of a head, that have codes


@dataclass(frozen=True)
class PageLayout:
    """Where everything lies in a page: blocks one after the other, then the key and the value of the sequence's first token.

    sink: [2, kv_heads, head_dim] in sink_dtype, written in a sequence's first page only. nbytes: of the page.
    """

    kv_heads: int
    head_dim: int
    sides: tuple[SideLayout, SideLayout]
    block_bytes: int
    sink: int
    sink_dtype: torch.dtype
    nbytes: int

    @classmethod
    def of(cls, quantizers: tuple[TrellisQuantizer, TrellisQuantizer], sink_dtype: torch.dtype) -> "PageLayout":
        """That of a layer. sink_dtype: of keys and values as they come."""
        assert quantizers[0].mean is not None
        kv_heads, head_dim = quantizers[0].mean.shape
        end, sides = 0, []
        for quantizer in quantizers:
            scheme = quantizer.scheme
            stream_bytes, n = scheme.codes(head_dim), scheme.outlier_positions(head_dim)
            budget = block_budget(scheme.outliers.fraction, n) if scheme.outliers.fraction else 0
            offsets = end + kv_heads * stream_bytes * BLOCK
            values = offsets + 4 * (kv_heads + 1)
            index = values + 2 * kv_heads * budget
            sides.append(SideLayout(end, stream_bytes, offsets, values, index, budget, n))
            end = -(-(index + 2 * kv_heads * budget) // 4) * 4
        sink = BLOCKS * end
        nbytes = sink + 2 * kv_heads * head_dim * sink_dtype.itemsize
        return cls(kv_heads, head_dim, (sides[0], sides[1]), end, sink, sink_dtype, nbytes)


class PagedLayer:
    """The pages of one layer. memory: [pages, bytes] uint8, of which `layout` describes each row; a row is contiguous.

    rope: rotates keys; those that come are rotated, those that are stored are not, but for the first token.
    """

    def __init__(
        self,
        quantizers: tuple[TrellisQuantizer, TrellisQuantizer],
        rope: RotaryEmbedding | None,
        memory: Tensor,
        sink_dtype: torch.dtype,
    ):
        self.quantizers, self.rope, self.memory = quantizers, rope, memory
        self.layout = PageLayout.of(quantizers, sink_dtype)
        self.plans = Plans()
        if memory.shape[1] < self.layout.nbytes:
            raise RecipeError(
                f"A page of {PAGE} tokens takes {self.layout.nbytes} bytes, and the engine's has {memory.shape[1]}; "
                "calibrate with equal layers."
            )
        self.sides = tuple(_SideViews(memory, self.layout, side) for side in self.layout.sides)

    def append(self, groups: list[RunGroup], keys: Tensor, values: Tensor) -> None:
        """Encode new tokens [tokens, kv_heads, head_dim], keys rotated, into their pages; raises ActivationError on NaN."""
        require_finite("Keys or values", keys[None], values[None])
        for group in groups:
            of_keys, of_values = (part[group.rows].transpose(1, 2) for part in (keys, values))
            for row, run in enumerate(group.runs):
                if run.position == 0:
                    self._put_sink(run.page, of_keys[row, :, 0], of_values[row, :, 0])
            self._encode(0, group, self._unrotated(of_keys, group))
            self._encode(1, group, of_values.float())

    def _unrotated(self, keys: Tensor, group: RunGroup) -> Tensor:
        """Keys [runs, kv_heads, tokens, head_dim] as the encoder takes them, float32."""
        if self.rope is None:
            return keys.float()
        found = self.rope.unrotate(keys, group.positions)
        frames, mean = self.quantizers[0].frames, self.quantizers[0].mean
        if group.single and frames is not None and mean is not None:
            center = mean[:, None].double()  # which the encoder takes out before it rotates
            found = frames.to_middle(found - center, group.positions % FRAME) + center
        return found.float()

    def _put_sink(self, page: int, key: Tensor, value: Tensor) -> None:
        self._sink(page).copy_(torch.stack([key, value]))

    def _sink(self, page: int) -> Tensor:
        """The first token's key and value in a page: [2, kv_heads, head_dim]."""
        layout = self.layout
        return self.memory[page, layout.sink : layout.nbytes].view(layout.sink_dtype).view(2, layout.kv_heads, layout.head_dim)

    def _encode(self, side: int, group: RunGroup, x: Tensor) -> None:
        """x: [runs, kv_heads, tokens, head_dim] float32."""
        quantizer, views = self.quantizers[side], self.sides[side]
        views.crop(group)
        batch, heads, tokens, dim = x.shape
        buffer = EncodeBuffer(quantizer.scheme, batch, heads, group.first + tokens, dim, like=x)
        earlier = _count_earlier(buffer, views, group)
        buffer.outliers = quantizer.encode_into(buffer, group.first, x, group.sinks)
        views.put_streams(group, buffer.codes[:, :, group.first :])
        if buffer.outliers > earlier:
            _put_outliers(views, group, buffer, earlier)

    def dequantize(self, pages: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The tokens from `start`, where a block begins, to before `stop` of a sequence whose pages are these [n] int64.

        Returns keys, not rotated, and values, [1, kv_heads, tokens, head_dim] float32, the first token as it came.
        """
        blocks = torch.arange(start // BLOCK, -(-stop // BLOCK), dtype=torch.int64, device="cpu")
        where = (pages[blocks // BLOCKS], blocks % BLOCKS)
        found = [
            quantizer.dequantize(views.take(*where)).transpose(0, 1).flatten(1, 2)[None]
            for quantizer, views in zip(self.quantizers, self.sides, strict=True)
        ]
        keys, values = (part[:, :, : stop - start].contiguous() for part in found)
        if start == 0:
            key, value = self._sink(int(pages[0]))[:, None, :, None]
            at = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
            keys[:, :, :1], values[:, :, :1] = key if self.rope is None else self.rope.unrotate(key, at), value
        return keys, values


class PagedSequence:
    """A sequence in pages, to be read like a `LayerStore`. pages: [n] int64. first: where what is stored begins."""

    def __init__(self, layer: PagedLayer, pages: Tensor, first: int = 0):
        self.layer, self.pages, self.first = layer, pages, first

    def tiles(self, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As `LayerStore.tiles`."""
        for start in range(self.first, stop, TILE * BLOCK):
            yield start, *self.layer.dequantize(self.pages, start, min(start + TILE * BLOCK, stop))

    def read(self, stop: int) -> tuple[Tensor, Tensor]:
        """As `LayerStore.read`."""
        return self.layer.dequantize(self.pages, self.first, stop)

    def sink(self) -> tuple[Tensor, Tensor]:
        """The first token's key, rotated, and its value, where they lie: [1, kv_heads, 1, head_dim] each."""
        key, value = self.layer._sink(int(self.pages[0]))[:, None, :, None]
        return key, value


class _SideViews:
    """The keys, or the values, of all blocks, as views of the pages [pages, 2, ...]: `SideLayout` says of what."""

    def __init__(self, memory: Tensor, page: PageLayout, side: SideLayout):
        def view(offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
            size = dtype.itemsize
            strides = [*(math.prod(shape[i + 1 :]) for i in range(len(shape)))]
            start = (memory.storage_offset() + offset) // size
            shape = (len(memory), BLOCKS, *shape)
            strides = [memory.stride(0) // size, page.block_bytes // size, *strides]
            return torch.empty(0, dtype=dtype, device="cpu").set_(memory.untyped_storage(), start, shape, strides)

        heads = page.kv_heads
        self.coefficients, self.budget = side.coefficients, side.budget
        self.streams = view(side.streams, torch.uint8, heads, side.stream_bytes, BLOCK)
        self.offsets = view(side.offsets, torch.int32, heads + 1)
        self.values = view(side.values, torch.float16, heads * side.budget)
        self.index = view(side.index, torch.int16, heads * side.budget)

    def put_streams(self, group: RunGroup, codes: Tensor) -> None:
        """codes: [runs, kv_heads, tokens, bytes]."""
        pages, blocks = group.pages[:, None], group.blocks[:, None]
        self.streams[pages, blocks, :, :, group.offsets] = codes.transpose(1, 2)

    def crop(self, group: RunGroup) -> None:
        """Remove the outliers of tokens that are written again, and of later ones; of new blocks all."""
        first = group.offsets[:, 0]
        stored = self.offsets[group.pages, group.blocks]
        stored[first == 0] = 0
        self.offsets[group.pages, group.blocks] = stored
        if not self.budget or not bool(stored[:, -1].any()):
            return
        index = self.index[group.pages, group.blocks].int() & 0xFFFF
        counted = torch.arange(index.shape[1], dtype=torch.int32, device="cpu") < stored[:, -1:]
        for row in (counted & (index >= first[:, None] * self.coefficients)).any(1).nonzero()[:, 0].tolist():
            at = (int(group.pages[row]), int(group.blocks[row]))
            heads, own, values = self.outliers(*at)
            keep = own < int(first[row]) * self.coefficients
            self._write(at, heads[keep], own[keep], values[keep])

    def outliers(self, page: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Heads [n] int64, indices in the head int64, and values of a block's outliers, in their order."""
        offsets = self.offsets[page, block]
        stored = int(offsets[-1])
        heads = torch.arange(len(offsets) - 1, dtype=torch.int64, device="cpu").repeat_interleave(offsets.diff())
        return heads, self.index[page, block, :stored].long() & 0xFFFF, self.values[page, block, :stored].clone()

    def add_outliers(self, page: int, block: int, heads: Tensor, index: Tensor, values: Tensor) -> None:
        """Add some of later tokens than those there."""
        parts = zip(self.outliers(page, block), (heads, index, values), strict=True)
        heads, index, values = (torch.cat(both) for both in parts)
        order = heads.argsort(stable=True)
        self._write((page, block), heads[order], index[order], values[order])

    def _write(self, at: tuple[int, int], heads: Tensor, index: Tensor, values: Tensor) -> None:
        self.index[at][: len(heads)], self.values[at][: len(heads)] = index.short(), values
        self.offsets[at][1:] = torch.bincount(heads, minlength=self.offsets.shape[2] - 1).cumsum(0)

    def take(self, pages: Tensor, blocks: Tensor) -> QuantizedTensor:
        """Blocks as codes [n, kv_heads, 64, bytes of a stream]. pages, blocks: [n] int64."""
        codes = self.streams[pages, blocks].transpose(2, 3).contiguous()
        if not self.budget:
            return QuantizedTensor(codes)
        heads, size = codes.shape[1], BLOCK * self.coefficients
        offsets, index = self.offsets[pages, blocks], self.index[pages, blocks].long() & 0xFFFF
        counted = torch.arange(index.shape[1], dtype=torch.int32, device="cpu") < offsets[:, -1:]
        which = torch.arange(len(pages) * heads, dtype=torch.int64, device="cpu").repeat_interleave(offsets.diff().flatten())
        return QuantizedTensor(
            codes, {}, which * size + index[counted], self.values[pages, blocks][counted], self.coefficients
        )


def _count_earlier(buffer: EncodeBuffer, views: _SideViews, group: RunGroup) -> int:
    """Let the encoder know how many outliers each head of each block has, wherever they are; returns how many."""
    if buffer.outlier_index is None:
        return 0
    counts = views.offsets[group.pages, group.blocks].diff(dim=1).flatten()
    total = int(counts.sum())
    buffer.reserve(total + len(counts))
    heads = torch.arange(len(counts), dtype=torch.int64, device="cpu").repeat_interleave(counts)
    buffer.outlier_index[:total] = heads * (buffer.tokens * views.coefficients)
    buffer.outliers = total
    return total


def _put_outliers(views: _SideViews, group: RunGroup, buffer: EncodeBuffer, earlier: int) -> None:
    """Move the outliers that the encoder found to the blocks."""
    encoded = buffer.encoded()
    assert encoded.outlier_index is not None and encoded.outlier_values is not None
    index, order = encoded.outlier_index[earlier:].sort()
    values = encoded.outlier_values[earlier:][order]
    rows, heads, tokens, coefficients = torch.unravel_index(index, encoded.outlier_shape)
    at = group.offsets[rows, tokens - group.first] * views.coefficients + coefficients
    for row, own in zip(*(part.tolist() for part in rows.unique_consecutive(return_counts=True)), strict=True):
        run, start = group.runs[row], int((rows < row).sum())
        part = slice(start, start + own)
        views.add_outliers(run.page, run.block, heads[part], at[part], values[part])
