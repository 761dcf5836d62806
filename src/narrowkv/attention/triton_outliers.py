"""Triton: outliers of sealed blocks, exact numbers in place of those that their codes stand for.

A program has a tile of its own in global memory, of zeros, which stays in the caches nearest to it. It writes the outliers of a
block there, each by a thread, whichever tokens and channels they are of; reads the tile beside the block's codes, where what is
not zero goes before what a code stands for; and clears it. Nothing depends on how outliers are spread over rows.
"""

import triton
import triton.language as tl

from narrowkv.attention.triton_tiles import column_of, column_places


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
    for start in range(begin, end, F.nonzeros):
        which = start + tl.arange(0, F.nonzeros)
        live = which < end
        place = tl.load(index + which, mask=live, other=0).to(tl.int32)
        token, code = place // F.codes, place % F.codes
        for number in tl.static_range(tl.constexpr(F.numbers)):
            at = token * F.columns + column_of(code, F)
            if F.channel_major:
                at = (code + number * F.codes) * F.columns + column_of(token, F)
            exact = tl.zeros([F.nonzeros], tl.float32)
            if not clear:
                exact = outlier_values(entry, which * F.numbers + number, live, F)
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
    at = rows[:, None] * F.columns + tl.arange(0, F.columns)[None, :]
    exact = tl.load(tile + at, mask=live[:, None], other=0.0)
    return tl.where(exact != 0.0, exact, numbers)
