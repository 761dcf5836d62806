"""Attention in plain torch, tile by tile: decode a piece of the cache, attend to it, forget it. Runs on any device.

The softmax is carried from tile to tile (softmax.py), so that the memory needed does not grow with the length of the cache.
Computes in float32, or in float64 for queries in float64; products of many queries in 16 bits stay in 16 bits where torch has
a fused attention for them (fused.py): on a CPU, and on a GPU. There, queries in 32 bits, and scores with a softcap, are
computed piece by piece with scores that are held (`softmax.Running`).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from narrowkv.attention import fused
from narrowkv.attention.rope import AnyRope
from narrowkv.attention.softmax import Fused, Running, join
from narrowkv.attention.visible import Visible
from narrowkv.store import LayerStore

FEW_QUERIES = 16  # up to so many are computed exactly: decoding is what takes time there
QUERY_SLICE = 128  # queries at a time, which bounds the memory of the scores
KEY_SLICE = 512  # exact keys at a time
FUSED_SLICE = 2048  # of both, where scores are not held; as many stored keys, for each piece ends with a pass over all results


def attend(
    query: Tensor,
    store: LayerStore,
    *,
    past: int,
    new: tuple[Tensor, Tensor] | None,
    rope: AnyRope | None,
    kept: Tensor | None,
    visible: Visible,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the newest queries over the packed cache; parameters and result as of `naive.attend`."""
    query = query.to(precision_of(query, softcap))
    least = min(query.shape[2], FUSED_SLICE) if fuses(query, softcap) else 1
    stored = _stored(store, past, rope, kept, query.dtype, least)
    return attend_pieces(
        query, stored, past=past, new=new, visible=visible, scaling=scaling, softcap=softcap, sink_logits=sink_logits
    )


def fuses(query: Tensor, softcap: float | None) -> bool:
    """Whether torch's fused attention computes these queries, which is so for many of them where there is one (fused.py)."""
    return query.shape[2] > FEW_QUERIES and softcap is None and fused.device_for(query) is not None


def precision_of(query: Tensor, softcap: float | None) -> torch.dtype:
    """In which dtype products with keys and values are."""
    return query.dtype if fuses(query, softcap) else torch.promote_types(query.dtype, torch.float32)


def attend_pieces(
    query: Tensor,
    stored: Iterable[tuple[int, Tensor, Tensor]],
    *,
    past: int,
    new: tuple[Tensor, Tensor] | None,
    visible: Visible,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    joining: Callable[[Tensor, Tensor, Tensor, Tensor], None] = join,
) -> Tensor:
    """`attend` over what is stored as it comes: (index of the first token, rotated keys, values), in the dtype of the queries.

    query: in the dtype that `precision_of` tells. joining: `softmax.join`, or what does the same.
    """
    length = past + (new[0].shape[2] if new else 0)
    first = length - query.shape[2]
    query = query.contiguous()
    fusing = fuses(query, softcap)
    rows, columns = _sizes(query, visible) if fusing else (QUERY_SLICE, KEY_SLICE)
    parts: list[Fused | Running] = []
    for some in _slices(query.shape[2], rows):
        asking, part = range(first + some.start, first + some.stop), query[:, :, some]
        if fusing:
            parts.append(Fused(part, asking, visible, scaling, sink_logits, joining))
        else:
            parts.append(Running(part, asking, visible, scaling, softcap, sink_logits))
    for start, keys, values in stored:
        _show(parts, visible, start, keys, values)
    if new:
        for some in _slices(new[0].shape[2], columns):
            keys, values = (side[:, :, some].to(query.dtype).contiguous() for side in new)
            _show(parts, visible, past + some.start, keys, values)
    return torch.cat([part.result() for part in parts], dim=2) if len(parts) > 1 else parts[0].result()


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _sizes(query: Tensor, visible: Visible) -> tuple[int, int]:
    """Queries, and new keys, at a time where scores are not held.

    As many queries as slide with a window, else most keys are hidden from most; all of both on a GPU where no mask is needed.
    """
    if visible.sliding_window is not None:
        return min(max(visible.sliding_window, QUERY_SLICE), FUSED_SLICE), FUSED_SLICE
    if fused.device_for(query) == "gpu" and visible.padding is None and visible.rule is None:
        return query.shape[2], query.shape[2]
    return FUSED_SLICE, FUSED_SLICE


def _stored(
    store: LayerStore, past: int, rope: AnyRope | None, kept: Tensor | None, precision: torch.dtype, least: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index of the first token, rotated keys, values) of what is stored, `least` tokens or more at a time until the last."""
    pieces: list[tuple[Tensor, Tensor]] = []
    begin = tokens = 0
    for start, keys, values in store.tiles(past):
        if rope is not None and kept is not None:
            at = start - store.first
            keys = keys.to(torch.promote_types(precision, torch.float32))
            keys = rope.rotate(keys, kept[:, at : at + keys.shape[2]])
        begin = begin if pieces else start
        pieces.append((keys.to(precision), values.to(precision)))
        tokens = start + keys.shape[2] - begin
        if tokens >= least:
            yield begin, *_joined(pieces)
            pieces = []
    if pieces:
        yield begin, *_joined(pieces)


def _joined(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    keys, values = (torch.cat(side, dim=2) if len(side) > 1 else side[0].contiguous() for side in zip(*pieces, strict=True))
    return keys, values


def _show(parts: list[Fused | Running], visible: Visible, start: int, keys: Tensor, values: Tensor) -> None:
    """Let all queries see those of the tokens from `start` on that they may."""
    for part in parts:
        if tokens := visible.within(range(start, start + keys.shape[2]), part.asking):
            near = slice(tokens.start - start, tokens.stop - start)
            part.see(keys[:, :, near], values[:, :, near], tokens)
