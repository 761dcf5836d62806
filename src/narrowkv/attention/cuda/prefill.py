"""Attention of many queries on a GPU: kernels dequantize sealed blocks, a run of them at a time, for `tiled.attend_chunks`.

Queries in 16 bits go by torch's fused attention (sdpa.py); queries in 32 bits, and scores with a softcap, split by split with
materialized scores. The open tail, the window and attention sinks are few and dequantized by torch.
"""

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from narrowkv.attention import tiled
from narrowkv.attention.cuda.block_table import BlockTable, block_table_of, kernel_rope_state
from narrowkv.attention.cuda.kernels.layout import KernelConfig
from narrowkv.attention.cuda.stream_tables import Streams
from narrowkv.attention.head_transform import unrotate_output
from narrowkv.attention.inputs import AttentionInputs
from narrowkv.attention.rope import Rope
from narrowkv.codec import AnyQuantizer
from narrowkv.store import LayerStore
from narrowkv.store.sinks import put_sinks

# dequantized at a time: many tokens, since all results are gone over for each run; fewer where their elements take much memory
MOST_TOKENS, FEWEST_TOKENS, MOST_NUMBERS = 16_384, 2048, 2**26

Chunk = tuple[int, Tensor, Tensor]  # index of the first token, keys, values


def attend(inputs: AttentionInputs, store: LayerStore) -> Tensor:
    """Attention of the newest queries over the packed cache; result like that of `naive.attend`."""
    inputs = tiled.with_products_dtype(inputs)
    most = _most_tokens(store) if tiled.fuses(inputs) else tiled.FUSED_SLICE
    return tiled.attend_chunks(inputs, stored_chunks(inputs, store, most), _kernels("merge_states").merge_states)


def stored_chunks(inputs: AttentionInputs, store: LayerStore, most: int = MOST_TOKENS) -> Iterator[Chunk]:
    """All stored tokens before `past`, keys rotated, in the dtype of the queries, about `most` tokens at a time.

    What is not in sealed blocks comes with the last of them, for each chunk costs a pass over the results of all queries.
    """
    sealed = min(store.blocks.tokens, inputs.past - store.first)
    return _runs(inputs, store, sealed, most) if sealed > 0 else _unsealed(inputs, store)


def _kernels(name: str) -> Any:
    """A module of kernels, which needs Triton."""
    return importlib.import_module(f"narrowkv.attention.cuda.kernels.{name}")


def _most_tokens(store: LayerStore) -> int:
    elements = 2 * math.prod(store.shape or ())  # of a token of all sequences, keys and values
    return min(max(MOST_NUMBERS // elements, FEWEST_TOKENS), MOST_TOKENS)


def _unsealed(inputs: AttentionInputs, store: LayerStore) -> Iterator[Chunk]:
    """What is not in sealed blocks: the open tail, then the window."""
    dtype = inputs.query.dtype
    for start, keys, values in store.tiles(inputs.past, unsealed=True):
        yield start, inputs.rotate(keys, start - store.first).to(dtype), values.to(dtype)


def _runs(inputs: AttentionInputs, store: LayerStore, sealed: int, most: int) -> Iterator[Chunk]:
    """All where `sealed` tokens are in sealed blocks."""
    streams = Streams.of(store, inputs.rope)
    assert store.shape is not None
    batch, heads, dim = store.shape
    rope, stored = inputs.rope if inputs.rope_state is not None else None, inputs.past - store.first
    rope_state = kernel_rope_state(rope, inputs.rope_state)
    blocks = block_table_of(store, rope, rope_state, inputs.mask.padding)
    case = _case(inputs, blocks)
    rope_scale = rope.scaling if isinstance(rope, Rope) else 1.0
    sinks = _sinks(inputs, store)
    begin, column = 0, 0
    while begin < sealed:
        stop, end = column, begin
        while end < sealed and end - begin < most:
            end += store.blocks.columns[stop].count
            stop += 1
        end = min(end, sealed)
        capacity = (stored if end == sealed else end) - begin
        shape, dtype = (batch, heads, capacity, dim), inputs.query.dtype
        pair = tuple(torch.empty(shape, dtype=dtype, device=blocks.table.device) for _ in range(2))
        span = case, rope_state, rope_scale, range(column, stop), range(begin, end)
        if streams is None:
            _kernels("dequantize").dequantize(pair, blocks, *span)
            keys, values = (
                _unrotated(quantizer, matrix, elements)
                for quantizer, matrix, elements in zip(store.quantizers, blocks.head_rotations, pair, strict=True)
            )
        else:
            _kernels("dequantize_streams").dequantize_streams(pair, blocks, streams, *span)
            keys, values = pair[0], streams.sums.elements(pair[1])
        if sinks is not None and store.sinks.index is not None:
            put_sinks(store.first + begin, (keys, values), store.sinks.index, sinks)
        if end == sealed:
            for start, some_keys, some_values in _unsealed(inputs, store):
                at = start - store.first - begin
                keys[:, :, at : at + some_keys.shape[2]] = some_keys
                values[:, :, at : at + some_keys.shape[2]] = some_values
        yield store.first + begin, keys, values
        begin, column = end, stop


def _unrotated(quantizer: AnyQuantizer, matrix: Tensor | None, elements: Tensor) -> Tensor:
    """Decoded keys or values, as their codes see them, rotated back, in their dtype: learned rotations by products in that."""
    if quantizer.scheme.transform.hadamard:
        return unrotate_output(quantizer, None, elements.float()).to(elements.dtype)
    return unrotate_output(quantizer, None if matrix is None else matrix.to(elements.dtype), elements)


def _case(inputs: AttentionInputs, blocks: BlockTable) -> KernelConfig:
    """A case of keys alone."""
    return KernelConfig(
        rows=0,
        capacity=0,
        queries=0,
        sinks=0,
        softcap=False,
        padding=False,
        window=0,
        hidden=False,
        precision="ieee",
        **blocks.rope_config(inputs),
    )


def _sinks(inputs: AttentionInputs, store: LayerStore) -> tuple[Tensor, Tensor] | None:
    """Keys, rotated, and values of attention sinks [batch, kv_heads, sinks, head_dim]."""
    if store.sinks.elements is None or store.sinks.index is None or inputs.rope is None or inputs.rope_state is None:
        return store.sinks.elements
    keys, values = store.sinks.elements
    rope_state = inputs.rope_state_at((store.sinks.index - store.first).clamp(0, inputs.rope_state.shape[1] - 1))
    return inputs.rope.rotate(keys.to(torch.promote_types(keys.dtype, torch.float32)), rope_state), values
