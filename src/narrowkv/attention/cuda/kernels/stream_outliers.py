"""Triton: outliers of trellis-coded blocks, exact coefficients instead of what their codes stand for.

As in `outliers`, a program has a tile of zeros in global memory, writes a block's outliers there, in grid steps, and reads the
tile along with the codes. In 16 bits the tile is ordered as codes become elements: by which pair it is of
eight tokens of two frames, then by coefficients.
"""

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.lookup import halves
from narrowkv.attention.cuda.kernels.outliers import clear_some, exact_or, outlier_values, store_exact
from narrowkv.attention.cuda.kernels.prefetch import outlier_range
from narrowkv.attention.cuda.kernels.unpack import interleave


@triton.jit
def put_stream_outliers(tile, entry, head, codes, F: tl.constexpr):
    """Write the outliers of a head of a block to the tile. Returns what `clear_stream_outliers` takes."""
    begin, end = outlier_range(tl.load(entry + 7), head)
    first = put_steps(tile, entry, begin, end, codes, F)
    for start in range(begin + F.nonzeros, end, F.nonzeros):
        tl.debug_barrier()  # so that the compiler does not unroll what only a crowded block needs
        put_steps(tile, entry, start, end, codes, F)
    return begin, end, first


@triton.jit
def clear_stream_outliers(tile, entry, begin, end, first, F: tl.constexpr):
    """Write zeros where `put_stream_outliers` has written."""
    clear_some(tile, first, F)
    for start in range(begin + F.nonzeros, end, F.nonzeros):
        tl.debug_barrier()
        clear_some(tile, tile_offsets(coefficients_of(entry, start, end, F), tile.dtype.element_ty, F), F)


@triton.jit
def put_steps(tile, entry, start, end, codes, F: tl.constexpr):
    """A round of outliers from `start` on; returns their offsets in the tile [n]."""
    index = coefficients_of(entry, start, end, F)
    exact = outlier_values(entry, start + tl.arange(0, F.nonzeros), index >= 0, F)
    exact *= tl.load(codes.p_finer + index % F.codes, mask=index >= 0, other=0.0)
    at = tile_offsets(index, tile.dtype.element_ty, F)
    store_exact(tile, at, exact)
    return at


@triton.jit
def coefficients_of(entry, start, end, F: tl.constexpr):
    """Which coefficients of a block outliers from `start` on are: [n] int32, -1 from `end` on and beyond the block."""
    which = start + tl.arange(0, F.nonzeros)
    index = tl.load(tl.load(entry + 6).to(tl.pointer_type(tl.int16)) + which, mask=which < end, other=-1).to(tl.int32)
    return tl.where(index < 64 * F.codes, index, -1)


@triton.jit
def tile_offsets(index, ELEMENT: tl.constexpr, F: tl.constexpr):
    """Where coefficients of a block lie in the tile: [n] int32, -1 where there is none."""
    token, row = index // F.codes, index % F.codes
    at = row * 64 + token
    if ELEMENT == tl.float16:  # noqa: SIM300
        pair, unit = token // 2 % 2 * 2 + token // 16 % 2, token // 32 * 4 + token // 4 % 4
        at = ((pair * F.codes + row) * 8 + unit) * 2 + token % 2
    return tl.where(index >= 0, at, -1)


@triton.jit
def with_stream_outliers(even, odd, tile, rows, F: tl.constexpr):
    """Coefficients `rows`, as `read_steps` returns them, where the tile has exact ones, these."""
    live = (rows < F.codes)[:, None]
    if even.dtype == tl.float16:
        return exact_or(even, pairs_at(tile, rows, live, 0, F)), exact_or(odd, pairs_at(tile, rows, live, 1, F))
    else:
        exact = tl.load(tile + rows[:, None] * 64 + tl.arange(0, 64)[None, :], mask=live, other=0.0)
        steps = exact_or(even, exact)
        return steps, steps


@triton.jit
def pairs_at(tile, rows, live, odd: tl.constexpr, F: tl.constexpr):
    """What the tile holds of even, or odd, frames: [n, 32] float16."""
    at = tl.multiple_of(tile.to(tl.pointer_type(tl.int32), bitcast=True), 16) + tl.arange(0, 8)[None, :]
    first = tl.load(at + (odd * F.codes + rows[:, None]) * 8, mask=live, other=0)
    second = tl.load(at + ((2 + odd) * F.codes + rows[:, None]) * 8, mask=live, other=0)
    return halves(interleave(first, second))
