"""Where sealed blocks lie, as addresses in memory, for kernels that read them in place."""

import torch
from torch import Tensor

from narrowkv.store.page import BlockTableEntry, PackedTensor, Page


def addresses(columns: list[BlockTableEntry]) -> Tensor:
    """Addresses of the parts of each block, valid as long as the store has these columns.

    Returns [columns, batch, 2, 8] int64: for keys and for values three planes, scale, zero, outlier values, their index, and
    the offsets of the block's first head; 0 where there is no such part.
    """
    pages: dict[int, tuple[Page, list[int]]] = {}
    for i, column in enumerate(columns):
        pages.setdefault(id(column.page), (column.page, []))[1].append(i)
    found = torch.zeros(len(columns), len(columns[0].slots), 2, 8, dtype=torch.int64, device="cpu")
    for page, index in pages.values():
        slots = torch.stack([columns[i].slots for i in index])
        for side, part in enumerate((page.keys, page.values)):
            found[index, :, side] = _of_side(part, slots)
    return found


def _of_side(side: PackedTensor, slots: Tensor) -> Tensor:
    """slots: [columns, batch]. Returns [columns, batch, 8]."""
    parts: list[tuple[Tensor | None, int]] = [(plane, plane.stride(0)) for plane in side.planes]
    parts += [(None, 0)] * (3 - len(parts))
    parts += [(part, 0 if part is None else part.stride(0)) for part in (side.ranges.get("scale"), side.ranges.get("zero"))]
    parts += [(side.outlier_values, 0), (side.outlier_index, 0), (side.outlier_offsets, side.shape[0])]
    columns = [
        torch.zeros_like(slots) if part is None else part.data_ptr() + slots * stride * part.element_size()
        for part, stride in parts
    ]
    return torch.stack(columns, dim=-1)
