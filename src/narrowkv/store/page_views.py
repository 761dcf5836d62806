"""The keys, or the values, of pages in plain torch: read, and written one run of tokens at a time."""

import math

import torch
from torch import Tensor

from narrowkv.codec import QuantizedTensor, TrellisQuantizer
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.scheme_parts import BLOCK
from narrowkv.store.page_layout import PageLayout, SideLayout
from narrowkv.store.runs import BLOCKS, Run


class SideViews:
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

    def put(self, run: Run, quantizer: TrellisQuantizer, x: Tensor) -> None:
        """Encode tokens into their block; those that were there from the first of them on are gone. x: [kv_heads, tokens,
        head_dim] float32.
        """
        at, stop = (run.page, run.block), run.first + run.tokens
        heads, _, dim = x.shape
        buffer = EncodeBuffer(quantizer.scheme, 1, heads, BLOCK, dim, like=x)
        self._put_earlier(run, buffer)
        first_token = torch.arange(run.tokens, dtype=torch.int64, device="cpu")[None] + run.position == 0
        buffer.outliers = quantizer.encode_naive_into(buffer, run.first, x[None], first_token)
        self.streams[at][:, :, run.first : stop] = buffer.codes[0, :, run.first : stop].transpose(1, 2)
        self.offsets[at].zero_()
        if buffer.outlier_index is not None and buffer.outlier_values is not None:
            index, order = buffer.outlier_index[: buffer.outliers].sort()
            of_heads, own = index // (BLOCK * self.coefficients), index % (BLOCK * self.coefficients)
            self.index[at][: len(own)], self.values[at][: len(own)] = own.short(), buffer.outlier_values[order]
            self.offsets[at][1:] = torch.bincount(of_heads, minlength=heads).cumsum(0)

    def _put_earlier(self, run: Run, buffer: EncodeBuffer) -> None:
        """Let a buffer for a block have those outliers of it that stay."""
        if buffer.outlier_index is None or buffer.outlier_values is None or run.first == 0:
            return
        offsets = self.offsets[run.page, run.block]
        stored, each = int(offsets[-1]), offsets.diff()
        heads = torch.arange(len(each), dtype=torch.int64, device="cpu").repeat_interleave(each)
        own = self.index[run.page, run.block, :stored].long() & 0xFFFF
        stays = own < run.first * self.coefficients
        buffer.outliers = int(stays.sum())
        buffer.reserve(0)
        buffer.outlier_index[: buffer.outliers] = (heads * BLOCK * self.coefficients + own)[stays]
        buffer.outlier_values[: buffer.outliers] = self.values[run.page, run.block, :stored][stays]

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
