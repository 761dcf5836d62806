"""Packing on a GPU, written in Triton."""

import torch
from torch import Tensor

from narrowkv.codec.packing import PLANES

ROWS = 32  # of a head, that one program packs


def pack_into(planes: list[Tensor], codes: Tensor, bits: int) -> None:
    """`packing.pack` of codes [blocks, kv_heads, rows, length] uint8, of any strides, into memory that is there already.

    planes: contiguous [blocks, kv_heads, rows, length * plane / 8] uint8, lowest bits first. Needs Triton.
    """
    import triton

    from narrowkv.codec.cuda.kernels.pack import pack_codes

    blocks, heads, rows, length = codes.shape
    widths = (*PLANES[bits], 0)
    with torch.cuda.device_of(codes):
        pack_codes[(blocks * heads, triton.cdiv(rows, ROWS))](
            codes, planes[0], planes[-1], heads, rows, *codes.stride(),
            LENGTH=length, WIDE=triton.next_power_of_2(length), ROWS=ROWS, LOW=widths[0], HIGH=widths[1],
        )  # fmt: skip
