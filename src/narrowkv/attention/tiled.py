"""Attention in plain torch, tile by tile: dequantize a tile of the cache, attend to it, discard it. Runs on any device.

The softmax is carried from tile to tile (online_softmax.py), so that the memory needed does not grow with the length of the
cache. Computes in float32, or in float64 for queries in float64; products of many queries in 16 bits stay in 16 bits where
torch has a fused attention for them (sdpa.py): on a CPU, and on a GPU. There, queries in 32 bits, and scores with a softcap,
are computed split by split with materialized scores (`OnlineSoftmax`).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from narrowkv.attention import sdpa
from narrowkv.attention.inputs import AttentionInputs, Stored
from narrowkv.attention.mask import AttentionMask
from narrowkv.attention.online_softmax import OnlineSoftmax, SdpaAccumulator, merge_states

FEW_QUERIES = 16  # up to this many are computed exactly: dequantizing is what takes time there
QUERY_SLICE = 128  # queries at a time, which bounds the memory of the scores
KEY_SLICE = 512  # exact keys at a time
FUSED_SLICE = (
    2048  # of both, where scores are not materialized; as many stored keys, for each chunk ends with a pass over all results
)


def attend(inputs: AttentionInputs, store: Stored) -> Tensor:
    """Attention of the newest queries over the packed cache; result like that of `naive.attend`."""
    inputs = with_products_dtype(inputs)
    return attend_chunks(inputs, _stored(inputs, store, min(inputs.queries, FUSED_SLICE) if fuses(inputs) else 1))


def fuses(inputs: AttentionInputs) -> bool:
    """Whether torch's fused attention computes these queries, which is so for many of them where there is one (sdpa.py)."""
    return inputs.queries > FEW_QUERIES and inputs.softcap is None and sdpa.device_for(inputs.query) is not None


def with_products_dtype(inputs: AttentionInputs) -> AttentionInputs:
    """The same, queries in the dtype in which products with keys and values are."""
    dtype = inputs.query.dtype if fuses(inputs) else inputs.precision
    return inputs.with_query(inputs.query.to(dtype).contiguous())


def attend_chunks(
    inputs: AttentionInputs,
    stored: Iterable[tuple[int, Tensor, Tensor]],
    merge: Callable[[Tensor, Tensor, Tensor, Tensor], None] = merge_states,
) -> Tensor:
    """`attend` over what is stored as it comes: (index of the first token, rotated keys, values), in the dtype of the queries.

    inputs: as `with_products_dtype` returns them. merge: `online_softmax.merge_states`, or what does the same.
    """
    fusing, mask = fuses(inputs), inputs.mask
    rows, columns = _sizes(inputs) if fusing else (QUERY_SLICE, KEY_SLICE)
    parts: list[SdpaAccumulator | OnlineSoftmax] = [
        SdpaAccumulator(inputs, some, merge) if fusing else OnlineSoftmax(inputs, some)
        for some in _slices(inputs.queries, rows)
    ]
    for start, keys, values in stored:
        _show(parts, mask, start, keys, values)
    if inputs.new:
        for some in _slices(inputs.new[0].shape[2], columns):
            keys, values = (side[:, :, some].to(inputs.query.dtype).contiguous() for side in inputs.new)
            _show(parts, mask, inputs.past + some.start, keys, values)
    return torch.cat([part.result() for part in parts], dim=2) if len(parts) > 1 else parts[0].result()


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _sizes(inputs: AttentionInputs) -> tuple[int, int]:
    """Queries, and new keys, at a time where scores are not materialized.

    As many queries as slide with a window, else most keys are hidden from most; all of both on a GPU where no mask is needed.
    """
    mask = inputs.mask
    if mask.sliding_window is not None:
        return min(max(mask.sliding_window, QUERY_SLICE), FUSED_SLICE), FUSED_SLICE
    if sdpa.device_for(inputs.query) == "gpu" and mask.padding is None and mask.rule is None:
        return inputs.queries, inputs.queries
    return FUSED_SLICE, FUSED_SLICE


def _stored(inputs: AttentionInputs, store: Stored, least: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index of the first token, rotated keys, values) of what is stored, `least` tokens or more at a time until the last."""
    dtype = inputs.query.dtype
    chunks: list[tuple[Tensor, Tensor]] = []
    begin = tokens = 0
    for start, keys, values in store.tiles(inputs.past):
        begin = begin if chunks else start
        chunks.append((inputs.rotate(keys, start - store.first).to(dtype), values.to(dtype)))
        tokens = start + keys.shape[2] - begin
        if tokens >= least:
            yield begin, *_joined(chunks)
            chunks = []
    if chunks:
        yield begin, *_joined(chunks)


def _joined(chunks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    keys, values = (torch.cat(side, dim=2) if len(side) > 1 else side[0].contiguous() for side in zip(*chunks, strict=True))
    return keys, values


def _show(parts: list[SdpaAccumulator | OnlineSoftmax], mask: AttentionMask, start: int, keys: Tensor, values: Tensor) -> None:
    """Let all queries see those of the tokens from `start` on that they may."""
    for part in parts:
        if tokens := mask.within(range(start, start + keys.shape[2]), part.query_positions):
            near = slice(tokens.start - start, tokens.stop - start)
            part.update(keys[:, :, near], values[:, :, near], tokens)
