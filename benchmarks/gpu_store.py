"""Stores of any length on any device, for `benchmarks.gpu`: some blocks are encoded, and their bytes repeated in memory of
their own.
"""

import copy

import torch
from torch import Tensor

from benchmarks import drawn
from narrowkv import get_recipe
from narrowkv.codec import AnyQuantizer, Scheme
from narrowkv.store import BLOCK, LayerStore
from narrowkv.store.page import BlockTableEntry, PackedTensor, Page

DRAWN_BLOCKS = 32  # that differ
LOOSE = 37  # tokens beyond blocks and window


def quantizer(scheme: Scheme, kv_heads: int, device: torch.device) -> AnyQuantizer:
    """A scheme with tables drawn at random, for any number of KV heads."""
    made = drawn.random_quantizer(scheme)
    heads = torch.arange(kv_heads) % drawn.KV_HEADS
    tables = {name: table[heads] if table.dim() > 1 and len(table) > 1 else table for name, table in made.tensors().items()}
    return type(made)(made.scheme, **tables).to(device)


def filled(name: str, tokens: int, batch: int, kv_heads: int, device: torch.device, dtype: torch.dtype) -> LayerStore:
    """A store of whole blocks, up to `tokens` of each sequence, in one page, and of what else its recipe stores: attention
    sinks, a window, and a tail.
    """
    recipe = get_recipe(name)
    sides = quantizer(recipe.keys, kv_heads, device), quantizer(recipe.values, kv_heads, device)
    small = LayerStore(*sides, sinks=recipe.sinks)
    blocks = tokens // BLOCK
    shape = (2, batch, kv_heads, min(blocks, DRAWN_BLOCKS) * BLOCK, drawn.HEAD_DIM)
    keys, values = torch.randn(shape, dtype=dtype, device=device)
    small.append(keys, values)
    store = LayerStore(*sides, sinks=recipe.sinks, residual_length=recipe.residual_length)
    assert small.shape is not None and small.dtypes is not None
    store.begin(small.shape, small.dtypes, device)
    store.sinks.index, store.sinks.elements = small.sinks.index, small.sinks.elements
    store.blocks.hold(columns_of(small.blocks.columns[0].page, blocks, batch))
    store.append(*torch.randn(2, batch, kv_heads, recipe.residual_length + LOOSE, drawn.HEAD_DIM, dtype=dtype, device=device))
    return store


def another(store: LayerStore) -> LayerStore:
    """The same in memory of its own."""
    assert store.shape is not None
    quantizers = {id(quantizer): quantizer for quantizer in store.quantizers}  # their tables are shared, as in a layer
    other = copy.deepcopy(store, quantizers)
    other.blocks.hold(columns_of(store.blocks.columns[0].page, len(store.blocks.columns), store.shape[0]))
    return other


def columns_of(page: Page, blocks: int, batch: int) -> list[BlockTableEntry]:
    """This many blocks of each sequence in one page: those of another, again and again."""
    slots = blocks * batch
    larger = Page(slots, repeated(page.keys, slots), repeated(page.values, slots))
    larger.used = slots
    return [BlockTableEntry(larger, row.clone(), BLOCK) for row in torch.arange(slots).view(blocks, batch)]


def repeated(side: PackedTensor, slots: int) -> PackedTensor:
    """The first blocks of a side again and again, `slots` in all."""
    have = len(side.planes[0])
    block = torch.arange(slots, device=side.planes[0].device) % have  # which of them each slot repeats
    planes, ranges = [plane[block] for plane in side.planes], {name: part[block] for name, part in side.ranges.items()}
    outliers: tuple[Tensor, Tensor, Tensor] | None = None
    if side.outlier_values is not None and side.outlier_index is not None and side.outlier_offsets is not None:
        values, index = side.outlier_values[: side.outliers_used], side.outlier_index[: side.outliers_used]
        times = -(-slots // have)
        counts = side.outlier_offsets.diff().view(have, -1)[block].flatten()
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        total = int(offsets[-1])
        outliers = (
            values.repeat(times, *[1] * (values.dim() - 1))[:total].clone(),
            index.repeat(times)[:total].clone(),
            offsets,
        )
    return PackedTensor(side.shape, side.bits, side.channel_major, planes, ranges, outliers)


def bytes_of(store: LayerStore) -> int:
    """Bytes allocated for what is stored."""
    return sum(part.nbytes for part in store.tensors())
