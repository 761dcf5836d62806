"""Attention in plain torch, tile by tile: dequantize a piece of the cache, attend to it, forget it. Runs on any device.

The softmax is carried from tile to tile (online_softmax.py), so that the memory needed does not grow with the length of the
cache. Computes in float32, or in float64 for queries in float64; products of many queries in 16 bits stay in 16 bits where
torch has a fused attention for them (sdpa.py): on a CPU, and on a GPU. There, queries in 32 bits, and scores with a softcap,
are computed piece by piece with scores that are held (`softmax.OnlineSoftmax`).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from narrowkv.attention import sdpa
from narrowkv.attention.mask import AttentionMask
from narrowkv.attention.online_softmax import OnlineSoftmax, SdpaAccumulator, merge_states
from narrowkv.attention.rope import AnyRope
from narrowkv.store import LayerStore

FEW_QUERIES = 16  # up to this many are computed exactly: dequantizing is what takes time there
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
    rope_state: Tensor | None,
    mask: AttentionMask,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the newest queries over the packed cache; parameters and result like those of `naive.attend`."""
    query = query.to(precision_of(query, softcap))
    least = min(query.shape[2], FUSED_SLICE) if fuses(query, softcap) else 1
    stored = _stored(store, past, rope, rope_state, query.dtype, least)
    return attend_pieces(
        query, stored, past=past, new=new, mask=mask, scaling=scaling, softcap=softcap, sink_logits=sink_logits
    )


def fuses(query: Tensor, softcap: float | None) -> bool:
    """Whether torch's fused attention computes these queries, which is so for many of them where there is one (sdpa.py)."""
    return query.shape[2] > FEW_QUERIES and softcap is None and sdpa.device_for(query) is not None


def precision_of(query: Tensor, softcap: float | None) -> torch.dtype:
    """In which dtype products with keys and values are."""
    return query.dtype if fuses(query, softcap) else torch.promote_types(query.dtype, torch.float32)


def attend_pieces(
    query: Tensor,
    stored: Iterable[tuple[int, Tensor, Tensor]],
    *,
    past: int,
    new: tuple[Tensor, Tensor] | None,
    mask: AttentionMask,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    merge: Callable[[Tensor, Tensor, Tensor, Tensor], None] = merge_states,
) -> Tensor:
    """`attend` over what is stored as it comes: (index of the first token, rotated keys, values), in the dtype of the queries.

    query: in the dtype that `precision_of` tells. merge: `online_softmax.merge_states`, or what does the same.
    """
    length = past + (new[0].shape[2] if new else 0)
    first = length - query.shape[2]
    query = query.contiguous()
    fusing = fuses(query, softcap)
    rows, columns = _sizes(query, mask) if fusing else (QUERY_SLICE, KEY_SLICE)
    parts: list[SdpaAccumulator | OnlineSoftmax] = []
    for some in _slices(query.shape[2], rows):
        query_positions, part = range(first + some.start, first + some.stop), query[:, :, some]
        if fusing:
            parts.append(SdpaAccumulator(part, query_positions, mask, scaling, sink_logits, merge))
        else:
            parts.append(OnlineSoftmax(part, query_positions, mask, scaling, softcap, sink_logits))
    for start, keys, values in stored:
        _show(parts, mask, start, keys, values)
    if new:
        for some in _slices(new[0].shape[2], columns):
            keys, values = (side[:, :, some].to(query.dtype).contiguous() for side in new)
            _show(parts, mask, past + some.start, keys, values)
    return torch.cat([part.result() for part in parts], dim=2) if len(parts) > 1 else parts[0].result()


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _sizes(query: Tensor, mask: AttentionMask) -> tuple[int, int]:
    """Queries, and new keys, at a time where scores are not held.

    As many queries as slide with a window, else most keys are hidden from most; all of both on a GPU where no mask is needed.
    """
    if mask.sliding_window is not None:
        return min(max(mask.sliding_window, QUERY_SLICE), FUSED_SLICE), FUSED_SLICE
    if sdpa.device_for(query) == "gpu" and mask.padding is None and mask.rule is None:
        return query.shape[2], query.shape[2]
    return FUSED_SLICE, FUSED_SLICE


def _stored(
    store: LayerStore, past: int, rope: AnyRope | None, rope_state: Tensor | None, precision: torch.dtype, least: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index of the first token, rotated keys, values) of what is stored, `least` tokens or more at a time until the last."""
    pieces: list[tuple[Tensor, Tensor]] = []
    begin = tokens = 0
    for start, keys, values in store.tiles(past):
        if rope is not None and rope_state is not None:
            at = start - store.first
            keys = keys.to(torch.promote_types(precision, torch.float32))
            keys = rope.rotate(keys, rope_state[:, at : at + keys.shape[2]])
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


def _show(parts: list[SdpaAccumulator | OnlineSoftmax], mask: AttentionMask, start: int, keys: Tensor, values: Tensor) -> None:
    """Let all queries see those of the tokens from `start` on that they may."""
    for part in parts:
        if tokens := mask.within(range(start, start + keys.shape[2]), part.query_positions):
            near = slice(tokens.start - start, tokens.stop - start)
            part.update(keys[:, :, near], values[:, :, near], tokens)
