"""A kernel in Triton by which tests look at what others read of trellis-coded streams."""

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.streams import code_rows, joined, read_steps


@triton.jit
def decode_block(p_found, p_entry, codes, F: tl.constexpr, ELEMENT: tl.constexpr):
    """p_found: [kv_heads, capacity, 64], grid steps of one block at the address p_entry."""
    head, row = tl.program_id(0), tl.arange(0, F.capacity)
    even, odd = read_steps(p_entry, head, row, code_rows(codes, row, ELEMENT, F), codes, ELEMENT, F)
    at = (head * F.capacity + row)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(p_found + at, joined(even, odd, ELEMENT))
