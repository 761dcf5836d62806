"""What kernels on a GPU read of one side of a store besides its sealed blocks: tables, tail, sinks, window, new tokens."""

from typing import Any

from torch import Tensor

from narrowkv.attention.cuda.block_table import BlockTable
from narrowkv.codec.cuda.encode import to_device_async
from narrowkv.store import LayerStore


def packed_tensor_args(store: LayerStore, blocks: BlockTable, side: int, new: Tensor | None) -> dict[str, Any]:
    """Keys, or values, by the names of `launch.PackedTensorArgs`; how much of them counts is given by `lengths`."""
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
    return parts


def by_head(x: Tensor) -> Tensor:
    """x [batch, heads, tokens, head_dim], elements of a head together and heads equally far apart; a copy if they are not."""
    contiguous = x.stride(3) == 1 and x.stride(2) == x.shape[3] and x.stride(0) == x.shape[1] * x.stride(1)
    return x if contiguous else x.contiguous()
