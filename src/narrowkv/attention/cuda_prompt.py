"""Attention of many queries on a GPU: kernels decode sealed blocks, a run of them at a time, for `tiled.attend_pieces`.

Queries in 16 bits go by torch's fused attention (fused.py); queries in 32 bits, and scores with a softcap, piece by piece with
scores that are held. The open tail, the window and attention sinks are few and decoded by torch.
"""

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from narrowkv.attention import tiled
from narrowkv.attention.cuda_blocks import Blocks, blocks_of
from narrowkv.attention.reading import turn_sum
from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.attention.triton_forms import Case
from narrowkv.attention.visible import Visible
from narrowkv.codec import AnyQuantizer
from narrowkv.store import LayerStore
from narrowkv.store.sinks import put_sinks

# decoded at a time: many tokens, since all results are gone over for each run; fewer where their numbers take much memory
MOST_TOKENS, FEWEST_TOKENS, MOST_NUMBERS = 16_384, 2048, 2**26

Piece = tuple[int, Tensor, Tensor]  # index of the first token, keys, values


def attend(
    query: Tensor,
    store: LayerStore,
    *,
    past: int,
    new: tuple[Tensor, Tensor] | None,
    rope: AnyRope | None,
    kept: Tensor | None,
    read: Tensor | None,
    visible: Visible,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the newest queries over the packed cache; parameters and result as of `naive.attend`.

    read: what is kept, as kernels read it: positions [1 or batch, tokens] int32, or cosines and sines [.., tokens, 2, pairs].
    """
    query = query.to(tiled.precision_of(query, softcap))
    most = _most_tokens(store) if tiled.fuses(query, softcap) else tiled.FUSED_SLICE
    stored = pieces(store, past, rope, kept, read, visible.padding, query.dtype, most)
    options: dict[str, Any] = {"visible": visible, "scaling": scaling, "softcap": softcap, "sink_logits": sink_logits}
    return tiled.attend_pieces(query, stored, past=past, new=new, joining=_kernels("join").join, **options)


def pieces(
    store: LayerStore,
    past: int,
    rope: AnyRope | None,
    kept: Tensor | None,
    read: Tensor | None,
    padding: Tensor | None,
    precision: torch.dtype,
    most: int = MOST_TOKENS,
) -> Iterator[Piece]:
    """All that is held before `past`, keys turned, in this dtype, about `most` tokens at a time; parameters as of `attend`.

    What is not in sealed blocks comes with the last of them, for each piece costs a pass over the results of all queries.
    """
    rope = rope if kept is not None else None
    turning = None if rope is None or kept is None else (rope, kept)
    if min(store.blocks.tokens, past - store.first) <= 0:
        return _unsealed(store, past, turning, precision)
    return _runs(store, blocks_of(store, rope, read, padding), past, turning, read, precision, most)


def _kernels(name: str) -> Any:
    """A module of kernels, which needs Triton."""
    return importlib.import_module(f"narrowkv.attention.triton_{name}")


def _most_tokens(store: LayerStore) -> int:
    numbers = 2 * math.prod(store.shape or ())  # of a token of all sequences, keys and values
    return min(max(MOST_NUMBERS // numbers, FEWEST_TOKENS), MOST_TOKENS)


def _unsealed(store: LayerStore, past: int, turning: tuple[AnyRope, Tensor] | None, precision: torch.dtype) -> Iterator[Piece]:
    """What is not in sealed blocks: the open tail, then the window."""
    for start, keys, values in store.tiles(past, unsealed=True):
        if turning is not None:
            rope, kept = turning
            at = start - store.first
            keys = rope.rotate(keys.to(torch.promote_types(precision, torch.float32)), kept[:, at : at + keys.shape[2]])
        yield start, keys.to(precision), values.to(precision)


def _runs(
    store: LayerStore,
    blocks: Blocks,
    past: int,
    turning: tuple[AnyRope, Tensor] | None,
    read: Tensor | None,
    precision: torch.dtype,
    most: int,
) -> Iterator[Piece]:
    decode = _kernels("decode").decode
    assert store.shape is not None
    batch, heads, dim = store.shape
    held, sealed = past - store.first, min(past - store.first, store.blocks.tokens)
    case = _case(dim, blocks, turning)
    stretch = turning[0].scaling if turning is not None and isinstance(turning[0], Rope) else 1.0
    sinks = _sinks(store, turning)
    begin, column = 0, 0
    while begin < sealed:
        stop, end = column, begin
        while end < sealed and end - begin < most:
            end += store.blocks.columns[stop].count
            stop += 1
        end = min(end, sealed)
        room = (held if end == sealed else end) - begin
        pair = tuple(torch.empty(batch, heads, room, dim, dtype=precision, device=blocks.table.device) for _ in range(2))
        decode(pair, blocks, case, read, stretch, range(column, stop), range(begin, end))
        keys, values = (
            _turned_back(quantizer, matrix, numbers)
            for quantizer, matrix, numbers in zip(store.quantizers, blocks.matrices, pair, strict=True)
        )
        if sinks is not None and store.sinks.index is not None:
            put_sinks(store.first + begin, (keys, values), store.sinks.index, sinks)
        if end == sealed:
            for start, some_keys, some_values in _unsealed(store, past, turning, precision):
                at = start - store.first - begin
                keys[:, :, at : at + some_keys.shape[2]] = some_keys
                values[:, :, at : at + some_keys.shape[2]] = some_values
        yield store.first + begin, keys, values
        begin, column = end, stop


def _turned_back(quantizer: AnyQuantizer, matrix: Tensor | None, numbers: Tensor) -> Tensor:
    """Decoded keys or values, as their codes see them, turned back, in their dtype: learned turns by products in that."""
    if quantizer.scheme.hadamard:
        return turn_sum(quantizer, None, numbers.float()).to(numbers.dtype)
    return turn_sum(quantizer, None if matrix is None else matrix.to(numbers.dtype), numbers)


def _case(dim: int, blocks: Blocks, turning: tuple[AnyRope, Tensor] | None) -> Case:
    """A case of keys alone."""
    pairs = 0 if turning is None else blocks.pairs or turning[1].shape[-1]
    return Case(
        rows=0,
        room=0,
        queries=0,
        dim=dim,
        pairs=pairs,
        interleaved=turning is not None and turning[0].interleaved,
        turning=blocks.turning,
        sinks=0,
        softcap=False,
        padding=False,
        window=0,
        hidden=False,
        precision="ieee",
    )


def _sinks(store: LayerStore, turning: tuple[AnyRope, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Keys, turned, and values of attention sinks [batch, kv_heads, sinks, head_dim]."""
    if store.sinks.numbers is None or store.sinks.index is None or turning is None:
        return store.sinks.numbers
    keys, values = store.sinks.numbers
    rope, kept = turning
    at = (store.sinks.index - store.first).clamp(0, kept.shape[1] - 1)
    rows = torch.arange(len(at), device=at.device, dtype=torch.int64)[:, None]
    kept = kept.expand(len(at), *kept.shape[1:])[rows, at]
    return rope.rotate(keys.to(torch.promote_types(keys.dtype, torch.float32)), kept), values
