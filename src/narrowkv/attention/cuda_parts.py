"""What kernels on a GPU read of one side of a store beside its sealed blocks: tables, tail, sinks, window, new tokens."""

from typing import Any

from torch import Tensor

from narrowkv.attention.cuda_blocks import Blocks
from narrowkv.codec.cuda import sent
from narrowkv.store import LayerStore


def side_parts(store: LayerStore, blocks: Blocks, side: int, new: Tensor | None) -> dict[str, Any]:
    """Keys, or values, by the names of `triton_launch.SideParts`; how much of them counts is told by `lengths`."""
    tables = blocks.tables[side]
    parts: dict[str, Tensor | None] = {
        "table": tables.table,
        "bytes": tables.bytes,
        "scale": tables.scale,
        "zero": tables.zero,
    }
    if store.tail:
        room = store.tail.rooms[side]
        parts |= {
            "tail": room.codes,
            "tail_scale": room.ranges.get("scale"),
            "tail_zero": room.ranges.get("zero"),
            "tail_outliers": room.outlier_values,
            "tail_index": room.outlier_index,
            "tail_count": room.tally.counts if room.tally else sent([room.outliers], room.codes.device),
        }
    if store.sinks.numbers is not None:
        parts["sinks"] = store.sinks.numbers[side]
    if store.recent.room:
        parts["window"] = by_head(store.recent.room[side])
    if new is not None and new.shape[2]:
        parts["new"] = by_head(new)
    return parts


def by_head(x: Tensor) -> Tensor:
    """x [batch, heads, tokens, head_dim], numbers of a head together and heads equally far apart; a copy if they are not."""
    together = x.stride(3) == 1 and x.stride(2) == x.shape[3] and x.stride(0) == x.shape[1] * x.stride(1)
    return x if together else x.contiguous()
