"""Triton: outliers of sealed blocks, exact numbers in place of those that their codes stand for.

A program has a tile of its own in global memory, of zeros, which stays in the caches nearest to it. It writes the outliers of a
block there, each by a thread, whichever tokens and channels they are of; reads the tile beside the block's codes, where what is
not zero goes before what a code stands for; and clears it. Nothing depends on how outliers are spread over rows.
"""

import triton
import triton.language as tl

from narrowkv.attention.triton_tiles import INTERPRETED, beside, column_of, column_places, fitting, halves


@triton.jit
def value_channels(V: tl.constexpr):
    """Which channel each row of a tile of values is: [channels]; head_dim or more where there is none."""
    if V.channel_major:
        row = tl.arange(0, V.channels)
        return tl.where(row // V.numbers < V.codes, row // V.numbers + row % V.numbers * V.codes, V.dim)
    else:
        return column_places(V)


@triton.jit
def put_outliers(tile, entry, head, clear: tl.constexpr, F: tl.constexpr):
    """Write the outliers of a head of a block to the tile [channels, or tokens, columns]; or zeros where they were."""
    offsets = tl.load(entry + 7).to(tl.pointer_type(tl.int32)) + head
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    index = tl.load(entry + 6).to(tl.pointer_type(tl.int16))
    put_some(tile, entry, index, begin, end, clear, F)
    for start in range(begin + F.nonzeros, end, F.nonzeros):  # of a crowded block
        tl.debug_barrier()  # so that the compiler does not unroll what hardly ever runs
        put_some(tile, entry, index, start, end, clear, F)


@triton.jit
def put_some(tile, entry, index, start, end, clear: tl.constexpr, F: tl.constexpr):
    """A round of `put_outliers`."""
    which = start + tl.arange(0, F.nonzeros)
    live = which < end
    place = tl.load(index + which, mask=live, other=0).to(tl.uint32)
    token, code = place // F.codes, place % F.codes
    for number in tl.static_range(tl.constexpr(F.numbers)):
        row, column = token, column_of(code, F)
        if F.channel_major:
            row, column = code + number * F.codes, column_of(token, F)
        at = row * F.columns + column
        if F.by_bytes and tile.dtype.element_ty == tl.float16:
            at = (column % F.each // 2 * F.tile_rows + row) * F.units * 2 + column // F.each * 2 + column % 2
        exact = tl.zeros([F.nonzeros], tile.dtype.element_ty)
        if not clear:
            exact = fitting(outlier_values(entry, which * F.numbers + number, live, F), tile.dtype.element_ty)
            exact = tl.where(exact == 0.0, 6e-8 if tile.dtype.element_ty == tl.float16 else 1e-37, exact)
        tl.store(tile + at, exact.to(tile.dtype.element_ty), mask=live)


@triton.jit
def outlier_values(entry, at, live, F: tl.constexpr):
    """Exact numbers of outliers [n], float32."""
    address = tl.load(entry + 5)
    if F.kind == "bf16":
        return tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=live, other=0.0).to(tl.float32)
    elif F.kind == "fp32":
        return tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=live, other=0.0)
    else:
        return tl.load(address.to(tl.pointer_type(tl.float16)) + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def with_outliers(numbers, tile, rows, live, F: tl.constexpr):
    """Numbers [n, columns] of rows of the tile, those exact ones that it holds in their place."""
    if F.by_bytes and numbers.dtype == tl.float16:
        exact = halves(exact_words(tile, rows, live, F))
    else:
        at = rows[:, None] * F.columns + tl.arange(0, F.columns)[None, :]
        exact = tl.load(tile + at, mask=live[:, None], other=0.0)
    if INTERPRETED or numbers.dtype != tl.float16:
        return tl.where(exact != 0.0, exact, numbers)
    else:  # two numbers at once, of which one is zero or taken zero times
        return tl.inline_asm_elementwise(
            "{ .reg .b32 none; set.eq.f16x2.f16x2 none, $2, $3; fma.rn.f16x2 $0, $1, none, $2; }",
            "=r,r,r,r",
            [numbers, exact, tl.zeros_like(exact)],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def exact_words(tile, rows, live, F: tl.constexpr):
    """Rows of the tile as pairs of numbers, in the order in which `look_up_bytes` has them: [n, columns / 2] int32."""
    if F.sharing == 4:
        first = beside(piece_at(tile, rows, live, 0, F), piece_at(tile, rows, live, 4, F))
        second = beside(piece_at(tile, rows, live, 1, F), piece_at(tile, rows, live, 5, F))
        third = beside(piece_at(tile, rows, live, 2, F), piece_at(tile, rows, live, 6, F))
        fourth = beside(piece_at(tile, rows, live, 3, F), piece_at(tile, rows, live, 7, F))
    else:
        first, second = piece_at(tile, rows, live, 0, F), piece_at(tile, rows, live, 1, F)
        third, fourth = piece_at(tile, rows, live, 2, F), piece_at(tile, rows, live, 3, F)
    return beside(beside(first, third), beside(second, fourth))


@triton.jit
def piece_at(tile, rows, live, piece: tl.constexpr, F: tl.constexpr):
    """The two numbers of rows of the tile that come `piece`-th of each unit: [n, units] int32."""
    unit = tl.arange(0, F.units)[None, :]
    words = tl.multiple_of(tile.to(tl.pointer_type(tl.int32), bitcast=True), 16)
    return tl.load(words + (piece * F.tile_rows + rows[:, None]) * F.units + unit, mask=live[:, None], other=0)
