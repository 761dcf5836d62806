"""Attention of many queries on a GPU: kernels dequantize sealed blocks, a run of them at a time, for `tiled.attend_pieces`.

Queries in 16 bits go by torch's fused attention (sdpa.py); queries in 32 bits, and scores with a softcap, piece by piece with
scores that are held. The open tail, the window and attention sinks are few and dequantized by torch.
"""

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from narrowkv.attention import tiled
from narrowkv.attention.cuda.block_table import BlockTable, block_table_of
from narrowkv.attention.cuda.kernels.layout import KernelConfig
from narrowkv.attention.head_transform import unrotate_output
from narrowkv.attention.mask import AttentionMask
from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.codec import AnyQuantizer
from narrowkv.store import LayerStore
from narrowkv.store.sinks import put_sinks

# dequantized at a time: many tokens, since all results are gone over for each run; fewer where their elements take much memory
MOST_TOKENS, FEWEST_TOKENS, MOST_NUMBERS = 16_384, 2048, 2**26

Piece = tuple[int, Tensor, Tensor]  # index of the first token, keys, values


def attend(
    query: Tensor,
    store: LayerStore,
    *,
    past: int,
    new: tuple[Tensor, Tensor] | None,
    rope: AnyRope | None,
    rope_state: Tensor | None,
    read: Tensor | None,
    mask: AttentionMask,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the newest queries over the packed cache; parameters and result like those of `naive.attend`.

    read: what is stored, as kernels read it: positions [1 or batch, tokens] int32, or cosines and sines [.., tokens, 2,
    pairs].
    """
    query = query.to(tiled.precision_of(query, softcap))
    most = _most_tokens(store) if tiled.fuses(query, softcap) else tiled.FUSED_SLICE
    stored = pieces(store, past, rope, rope_state, read, mask.padding, query.dtype, most)
    options: dict[str, Any] = {"mask": mask, "scaling": scaling, "softcap": softcap, "sink_logits": sink_logits}
    return tiled.attend_pieces(query, stored, past=past, new=new, merge=_kernels("merge_states").merge_states, **options)


def pieces(
    store: LayerStore,
    past: int,
    rope: AnyRope | None,
    rope_state: Tensor | None,
    read: Tensor | None,
    padding: Tensor | None,
    precision: torch.dtype,
    most: int = MOST_TOKENS,
) -> Iterator[Piece]:
    """All that is held before `past`, keys rotated, in this dtype, about `most` tokens at a time; parameters like those of
    `attend`.

    What is not in sealed blocks comes with the last of them, for each piece costs a pass over the results of all queries.
    """
    rope = rope if rope_state is not None else None
    rope_and_state = None if rope is None or rope_state is None else (rope, rope_state)
    if min(store.blocks.tokens, past - store.first) <= 0:
        return _unsealed(store, past, rope_and_state, precision)
    return _runs(store, block_table_of(store, rope, read, padding), past, rope_and_state, read, precision, most)


def _kernels(name: str) -> Any:
    """A module of kernels, which needs Triton."""
    return importlib.import_module(f"narrowkv.attention.cuda.kernels.{name}")


def _most_tokens(store: LayerStore) -> int:
    elements = 2 * math.prod(store.shape or ())  # of a token of all sequences, keys and values
    return min(max(MOST_NUMBERS // elements, FEWEST_TOKENS), MOST_TOKENS)


def _unsealed(
    store: LayerStore, past: int, rope_and_state: tuple[AnyRope, Tensor] | None, precision: torch.dtype
) -> Iterator[Piece]:
    """What is not in sealed blocks: the open tail, then the window."""
    for start, keys, values in store.tiles(past, unsealed=True):
        if rope_and_state is not None:
            rope, rope_state = rope_and_state
            at = start - store.first
            keys = rope.rotate(keys.to(torch.promote_types(precision, torch.float32)), rope_state[:, at : at + keys.shape[2]])
        yield start, keys.to(precision), values.to(precision)


def _runs(
    store: LayerStore,
    blocks: BlockTable,
    past: int,
    rope_and_state: tuple[AnyRope, Tensor] | None,
    read: Tensor | None,
    precision: torch.dtype,
    most: int,
) -> Iterator[Piece]:
    decode = _kernels("dequantize").dequantize
    assert store.shape is not None
    batch, heads, dim = store.shape
    held, sealed = past - store.first, min(past - store.first, store.blocks.tokens)
    case = _case(dim, blocks, rope_and_state)
    rope_scale = rope_and_state[0].scaling if rope_and_state is not None and isinstance(rope_and_state[0], Rope) else 1.0
    sinks = _sinks(store, rope_and_state)
    begin, column = 0, 0
    while begin < sealed:
        stop, end = column, begin
        while end < sealed and end - begin < most:
            end += store.blocks.columns[stop].count
            stop += 1
        end = min(end, sealed)
        capacity = (held if end == sealed else end) - begin
        pair = tuple(torch.empty(batch, heads, capacity, dim, dtype=precision, device=blocks.table.device) for _ in range(2))
        decode(pair, blocks, case, read, rope_scale, range(column, stop), range(begin, end))
        keys, values = (
            _unrotated(quantizer, matrix, elements)
            for quantizer, matrix, elements in zip(store.quantizers, blocks.head_rotations, pair, strict=True)
        )
        if sinks is not None and store.sinks.index is not None:
            put_sinks(store.first + begin, (keys, values), store.sinks.index, sinks)
        if end == sealed:
            for start, some_keys, some_values in _unsealed(store, past, rope_and_state, precision):
                at = start - store.first - begin
                keys[:, :, at : at + some_keys.shape[2]] = some_keys
                values[:, :, at : at + some_keys.shape[2]] = some_values
        yield store.first + begin, keys, values
        begin, column = end, stop


def _unrotated(quantizer: AnyQuantizer, matrix: Tensor | None, elements: Tensor) -> Tensor:
    """Decoded keys or values, as their codes see them, rotated back, in their dtype: learned rotations by products in that."""
    if quantizer.scheme.hadamard:
        return unrotate_output(quantizer, None, elements.float()).to(elements.dtype)
    return unrotate_output(quantizer, None if matrix is None else matrix.to(elements.dtype), elements)


def _case(dim: int, blocks: BlockTable, rope_and_state: tuple[AnyRope, Tensor] | None) -> KernelConfig:
    """A case of keys alone."""
    pairs = 0 if rope_and_state is None else blocks.pairs or rope_and_state[1].shape[-1]
    return KernelConfig(
        rows=0,
        capacity=0,
        queries=0,
        dim=dim,
        pairs=pairs,
        interleaved=rope_and_state is not None and rope_and_state[0].interleaved,
        rope_mode=blocks.rope_mode,
        sinks=0,
        softcap=False,
        padding=False,
        window=0,
        hidden=False,
        precision="ieee",
    )


def _sinks(store: LayerStore, rope_and_state: tuple[AnyRope, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Keys, rotated, and values of attention sinks [batch, kv_heads, sinks, head_dim]."""
    if store.sinks.elements is None or store.sinks.index is None or rope_and_state is None:
        return store.sinks.elements
    keys, values = store.sinks.elements
    rope, rope_state = rope_and_state
    at = (store.sinks.index - store.first).clamp(0, rope_state.shape[1] - 1)
    rows = torch.arange(len(at), device=at.device, dtype=torch.int64)[:, None]
    rope_state = rope_state.expand(len(at), *rope_state.shape[1:])[rows, at]
    return rope.rotate(keys.to(torch.promote_types(keys.dtype, torch.float32)), rope_state), values
