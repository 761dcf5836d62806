"""Where streams, outliers and the exact first token of 128 tokens lie in a page, in bytes."""

from dataclasses import dataclass

import torch

from narrowkv.codec import TrellisQuantizer
from narrowkv.codec.outlier_budget import block_budget
from narrowkv.codec.scheme_parts import BLOCK
from narrowkv.store.runs import BLOCKS


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
