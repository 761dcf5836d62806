"""Triton: codes into the planes that blocks are stored as, laid out as `codec.packing` has it."""

import triton
import triton.language as tl


@triton.jit
def pack_codes(
    codes, low, high, heads, rows, block_stride, head_stride, row_stride, code_stride,
    LENGTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Some rows of one head of a block, into all planes.

    codes: [blocks, heads, rows, LENGTH] uint8 by strides; LENGTH: a multiple of 8, and WIDE the power of 2 from it on. low,
    high: [blocks, heads, rows, bytes] planes of LOW and HIGH bits, the latter 0 where there is none.
    """
    batch_head, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block, head = batch_head // heads, batch_head % heads
    at = codes + block.to(tl.int64) * block_stride + head.to(tl.int64) * head_stride + row[:, None] * row_stride
    to, live = batch_head.to(tl.int64) * rows + row[:, None], row[:, None] < rows
    pack_plane(at, low, to, live, code_stride, LENGTH, WIDE, LOW, 0)
    if HIGH:
        pack_plane(at, high, to, live, code_stride, LENGTH, WIDE, HIGH, LOW)


@triton.jit
def pack_plane(
    at, plane, to, live, code_stride, LENGTH: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr
):
    """Some bits of rows of codes, which begin at `at`, into the rows `to` of a plane."""
    BYTES: tl.constexpr = LENGTH * BITS // 8
    byte = tl.arange(0, WIDE * BITS // 8)[None, :]
    live = live & (byte < BYTES)
    packed = tl.zeros(live.shape, tl.int32)
    for i in tl.static_range(8 // BITS):
        code = tl.load(at + (byte + i * BYTES) * code_stride, mask=live, other=0).to(tl.int32)
        packed = packed | (((code >> SHIFT) & ((1 << BITS) - 1)) << (i * BITS))
    tl.store(plane + to * BYTES + byte, packed.to(tl.uint8), mask=live)
