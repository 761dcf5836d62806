"""What kernels on a GPU read of one side of a store besides its sealed blocks: tables, tail, sinks, window, new tokens."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from narrowkv.attention.cuda.block_table import BlockTable
from narrowkv.attention.cuda.stream_tables import StreamTables
from narrowkv.codec.cuda.encode import to_device_async
from narrowkv.store import LayerStore


@dataclass(frozen=True)
class PackedTensorArgs:
    """Keys, or values: tables; what the tail holds; exact tokens. None where there is no such thing."""

    table: Tensor | None = None  # [heads, head_dim, levels] or [levels] float32
    bytes: Tensor | None = None  # like those of `codebooks.CodebookSet`, int32
    scale: Tensor | None = None  # [heads, head_dim] float32, fixed ones
    zero: Tensor | None = None
    tail: Tensor | None = None  # [batch, heads, 64, head_dim] uint8, or exact
    tail_scale: Tensor | None = None
    tail_zero: Tensor | None = None
    tail_outliers: Tensor | None = None
    tail_index: Tensor | None = None
    tail_count: Tensor | None = None  # [1 or more] int32, first of them how many outliers count
    sinks: Tensor | None = None  # [batch, heads, n, head_dim]
    window: Tensor | None = None
    new: Tensor | None = None
    codes: Tensor | None = None  # from here on as `stream_tables.StreamTables` has it
    entries: Tensor | None = None
    finer: Tensor | None = None
    channels: Tensor | None = None
    weights: Tensor | None = None
    offsets: Tensor | None = None
    cycles: Tensor | None = None
    pairs: Tensor | None = None
    pair_weights: Tensor | None = None


@dataclass(frozen=True)
class SharedArgs:
    """What keys and values have in common; shapes like those of `attend_blocks`."""

    blocks: Tensor | None = None  # [columns, batch, 2, 8] int64
    starts: Tensor | None = None  # [columns + 1] int32
    bases: Tensor | None = None  # [columns, batch] int32
    near: Tensor | None = None  # [2, pairs, 64] float32
    cycles: Tensor | None = None  # [pairs] float64
    rope_state: Tensor | None = None  # [1 or batch, tokens] int32, or [1 or batch, tokens, 2, pairs]
    padding: Tensor | None = None  # [batch, tokens] uint8
    hidden: Tensor | None = None  # [1 or batch, queries, tokens] uint8
    sink_index: Tensor | None = None  # [batch, sinks] int64
    sink_logits: Tensor | None = None  # [query_heads]


def packed_tensor_args(
    store: LayerStore, blocks: BlockTable, side: int, new: Tensor | None, streams: StreamTables | None = None
) -> dict[str, Any]:
    """Keys, or values, by the names of `PackedTensorArgs`; how much of them counts is given by `lengths`."""
    tables = blocks.tables[side]
    parts: dict[str, Tensor | None] = {
        "table": tables.table,
        "bytes": tables.bytes,
        "scale": tables.scale,
        "zero": tables.zero,
    }
    if store.tail:
        buffer = store.tail.buffers[side]
        parts |= {
            "tail": buffer.codes,
            "tail_scale": buffer.ranges.get("scale"),
            "tail_zero": buffer.ranges.get("zero"),
            "tail_outliers": buffer.outlier_values,
            "tail_index": buffer.outlier_index,
            "tail_count": buffer.counter.counts if buffer.counter else to_device_async([buffer.outliers], buffer.codes.device),
        }
    if store.sinks.elements is not None:
        parts["sinks"] = store.sinks.elements[side]
    if store.residual.buffer:
        parts["window"] = by_head(store.residual.buffer[side])
    if new is not None and new.shape[2]:
        parts["new"] = by_head(new)
    return parts if streams is None else parts | vars(streams)


def by_head(x: Tensor) -> Tensor:
    """x [batch, heads, tokens, head_dim], elements of a head together and heads equally far apart; a copy if they are not."""
    contiguous = x.stride(3) == 1 and x.stride(2) == x.shape[3] and x.stride(0) == x.shape[1] * x.stride(1)
    return x if contiguous else x.contiguous()
