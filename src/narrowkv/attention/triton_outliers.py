"""Triton: outliers of sealed blocks, added as what they differ by from the number that their code stands for.

All threads of a program share the outliers of a head of a block, so many at a time, whichever tokens and channels they are of;
a product with a matrix of zeros and ones brings each to its row.
"""

import triton
import triton.language as tl

from narrowkv.attention.triton_rows import angles, pair_of
from narrowkv.attention.triton_tiles import column_of, column_places, missed


@triton.jit
def value_channels(V: tl.constexpr):
    """Which channel each row of a tile of values is: [channels]; head_dim or more where there is none."""
    if V.channel_major:
        row = tl.arange(0, V.channels)
        return tl.where(row // V.numbers < V.codes, row // V.numbers + row % V.numbers * V.codes, V.dim)
    else:
        return column_places(V)


@triton.jit
def outlier_range(entry, head):
    """Where the outliers of a head of a block begin and end."""
    offsets = tl.load(entry + 7).to(tl.pointer_type(tl.int32)) + head
    return tl.load(offsets), tl.load(offsets + 1)


@triton.jit
def outlier_places(index, start, end, F: tl.constexpr):
    """Outliers from `start` on: their numbers [n], which of them are before `end`, their tokens and codes."""
    which = start + tl.arange(0, F.nonzeros)
    live = which < end
    places = tl.load(index + which, mask=live, other=0).to(tl.int32)
    return which, live, places // F.codes, places % F.codes


@triton.jit
def outlier_values(entry, which, number: tl.constexpr, live, F: tl.constexpr):
    """Exact numbers of outliers [n], float32."""
    address = tl.load(entry + 5)
    at = which * F.numbers + number
    if F.kind == "bf16":
        return tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=live, other=0.0).to(tl.float32)
    else:
        return tl.load(address.to(tl.pointer_type(tl.float16)) + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def brought_to(rows, added, ROWS: tl.constexpr, C: tl.constexpr):
    """Sums of added [n, room] by the row that each belongs to: [ROWS, room]. rows: [n]."""
    fits = (tl.arange(0, ROWS)[:, None] == rows[None, :]).to(tl.float32)
    return tl.dot(fits, added, input_precision=C.precision)


@triton.jit
def add_key_outliers(
    scores, entry, table, scale, zero, head, back_a, back_b, from_, near, turns, kept, K: tl.constexpr, C: tl.constexpr
):
    """Scores [64, room] with what outliers of keys add. back_a, back_b: queries [lanes, room]; from_: the token that `angles`
    count from.
    """
    begin, end = outlier_range(entry, head)
    index = tl.load(entry + 6).to(tl.pointer_type(tl.int16))
    for start in range(begin, end, K.nonzeros):
        which, live, token, code = outlier_places(index, start, end, K)
        added = tl.full([K.nonzeros, C.room], 0, tl.float32)
        for number in tl.static_range(tl.constexpr(K.numbers)):
            exact = outlier_values(entry, which, number, live, K)
            more = missed(entry, table, scale, zero, head, token, code, number, exact, live, K)
            pair, second = pair_of(code + number * K.codes, C)
            lanes = tl.broadcast_to(pair[:, None], [K.nonzeros, C.room])
            first_part, second_part = tl.gather(back_a, lanes, 0), tl.gather(back_b, lanes, 0)
            factor = tl.where(second[:, None], second_part, first_part)
            if C.turning != "none":
                cos, sin = angles(pair, from_ + token, live, near, turns, kept, C)
                crossed = tl.where(second[:, None], -first_part, second_part)
                factor = factor * cos[:, None] + crossed * sin[:, None]
            added += factor * more[:, None]
        scores += brought_to(column_of(token, K), added, 64, C)
    return scores


@triton.jit
def add_value_outliers(part, entry, table, scale, zero, head, weights, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr):
    """Sums [channels, room] with what outliers of values add; weights: [64, room]."""
    begin, end = outlier_range(entry, head)
    index = tl.load(entry + 6).to(tl.pointer_type(tl.int16))
    for start in range(begin, end, V.nonzeros):
        which, live, token, code = outlier_places(index, start, end, V)
        tokens = tl.broadcast_to(column_of(token, K)[:, None], [V.nonzeros, C.room])
        weight = tl.gather(weights, tokens, 0)
        for number in tl.static_range(tl.constexpr(V.numbers)):
            exact = outlier_values(entry, which, number, live, V)
            more = missed(entry, table, scale, zero, head, token, code, number, exact, live, V)
            row = code * V.numbers + number if V.channel_major else column_of(code, V)
            part += brought_to(row, weight * more[:, None], V.channels, C)
    return part
