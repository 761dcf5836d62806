"""Triton: outliers of sealed blocks, exact elements instead of those that their codes stand for.

A program has a tile of its own in global memory, of zeros, which stays in the caches nearest to it. It writes a block's
outliers there, each by a thread, whichever tokens and channels they are of; reads the tile along with the codes, where what is
not zero goes before what a code stands for (an exact zero is written as the smallest number); and clears it.
"""

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.lookup import halves
from narrowkv.attention.cuda.kernels.prefetch import outlier_range
from narrowkv.attention.cuda.kernels.unpack import INTERPRETED, column_of, fitting, interleave


@triton.jit
def put_outliers(tile, entry, head, F: tl.constexpr):
    """Write the outliers of a head of a block to the tile [channels, or tokens, columns]. Returns what `clear_outliers` takes.

    That is where outliers begin and end, and the first ones' offsets in the tile [n], -1 where there is none.
    """
    begin, end = outlier_range(tl.load(entry + 7), head)
    first = tile_offsets(entry, begin, end, tile.dtype.element_ty, F)
    put_some(tile, entry, first, begin, F)
    for start in range(begin + F.nonzeros, end, F.nonzeros):
        tl.debug_barrier()  # so that the compiler does not unroll what only a crowded block needs
        put_some(tile, entry, tile_offsets(entry, start, end, tile.dtype.element_ty, F), start, F)
    return begin, end, first


@triton.jit
def clear_outliers(tile, entry, begin, end, first, F: tl.constexpr):
    """Write zeros where `put_outliers` has written."""
    clear_some(tile, first, F)
    for start in range(begin + F.nonzeros, end, F.nonzeros):
        tl.debug_barrier()
        clear_some(tile, tile_offsets(entry, start, end, tile.dtype.element_ty, F), F)


@triton.jit
def tile_offsets(entry, start, end, ELEMENT: tl.constexpr, F: tl.constexpr):
    """Offsets in the tile of outliers from `start` on: [n] int32, -1 from `end` on."""
    which = start + tl.arange(0, F.nonzeros)
    index = tl.load(entry + 6).to(tl.pointer_type(tl.int16))
    element = tl.load(index + which, mask=which < end, other=0).to(tl.uint32)
    row, column = element // F.dim, column_of(element % F.dim, F)
    if F.channel_major:
        row, column = element % F.dim, column_of(element // F.dim, F)
    at = row * F.columns + column
    if F.by_bytes and ELEMENT == tl.float16:  # noqa: SIM300
        at = (column % F.each // 2 * F.tile_rows + row) * F.units * 2 + column // F.each * 2 + column % 2
    return tl.where(which < end, at.to(tl.int32), -1)


@triton.jit
def put_some(tile, entry, at, start, F: tl.constexpr):
    """A round of `put_outliers`."""
    which = start + tl.arange(0, F.nonzeros)
    store_exact(tile, at, outlier_values(entry, which, at >= 0, F))


@triton.jit
def store_exact(tile, at, exact):
    """Write exact elements [n] float32 to their offsets in the tile, none at -1; what is 0 is the smallest element there."""
    exact = fitting(exact, tile.dtype.element_ty)
    exact = tl.where(exact == 0.0, 6e-8 if exact.dtype == tl.float16 else 1e-37, exact).to(exact.dtype)
    tl.store(tile + at, exact, mask=at >= 0)


@triton.jit
def clear_some(tile, at, F: tl.constexpr):
    """A round of `clear_outliers`."""
    tl.store(tile + at, tl.full([F.nonzeros], 0, tile.dtype.element_ty), mask=at >= 0)


@triton.jit
def outlier_values(entry, at, live, F: tl.constexpr):
    """Exact elements of outliers [n], float32."""
    address = tl.load(entry + 5)
    if F.kind == "bf16":
        return tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=live, other=0.0).to(tl.float32)
    elif F.kind == "fp32":
        return tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=live, other=0.0)
    else:
        return tl.load(address.to(tl.pointer_type(tl.float16)) + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def with_outliers(elements, tile, rows, live, F: tl.constexpr):
    """Elements [n, columns] of rows of the tile, replaced by the exact ones in it."""
    if F.by_bytes and elements.dtype == tl.float16:
        exact = halves(exact_int16(tile, rows, live, F))
    else:
        at = rows[:, None] * F.columns + tl.arange(0, F.columns)[None, :]
        exact = tl.load(tile + at, mask=live[:, None], other=0.0)
    return exact_or(elements, exact)


@triton.jit
def exact_or(elements, exact):
    """Exact elements where they are not zero."""
    if INTERPRETED or elements.dtype != tl.float16:
        return tl.where(exact != 0.0, exact, elements)
    else:  # two elements at once, of which one is zero or taken zero times
        return tl.inline_asm_elementwise(
            "{ .reg .b32 none; set.eq.f16x2.f16x2 none, $2, $3; fma.rn.f16x2 $0, $1, none, $2; }",
            "=r,r,r,r",
            [elements, exact, tl.zeros_like(exact)],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def exact_int16(tile, rows, live, F: tl.constexpr):
    """Rows of the tile as pairs of elements, in the order in which `look_up_bytes` has them: [n, columns / 2] int32."""
    if F.sharing == 4:
        first = interleave(word_at(tile, rows, live, 0, F), word_at(tile, rows, live, 4, F))
        second = interleave(word_at(tile, rows, live, 1, F), word_at(tile, rows, live, 5, F))
        third = interleave(word_at(tile, rows, live, 2, F), word_at(tile, rows, live, 6, F))
        fourth = interleave(word_at(tile, rows, live, 3, F), word_at(tile, rows, live, 7, F))
    else:
        first, second = word_at(tile, rows, live, 0, F), word_at(tile, rows, live, 1, F)
        third, fourth = word_at(tile, rows, live, 2, F), word_at(tile, rows, live, 3, F)
    return interleave(interleave(first, third), interleave(second, fourth))


@triton.jit
def word_at(tile, rows, live, word: tl.constexpr, F: tl.constexpr):
    """The two elements of rows of the tile in word `word` of each unit: [n, units] int32."""
    unit = tl.arange(0, F.units)[None, :]
    words = tl.multiple_of(tile.to(tl.pointer_type(tl.int32), bitcast=True), 16)
    return tl.load(words + (word * F.tile_rows + rows[:, None]) * F.units + unit, mask=live[:, None], other=0)
