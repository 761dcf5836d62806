"""Triton: from packed bytes to tiles of numbers.

A row of codes is read as units of 8 to 32 bits, and codes that come out of one unit stay side by side. So a tile's columns come
in an order of their own, `column_places`, which follows from the form alone. Rows of a channel-major side are channels (or
pairs) and columns are tokens; of a token-major side it is the other way round.
"""

import triton
import triton.language as tl


@triton.jit
def column_places(F: tl.constexpr):
    """Which code of a row each column of a tile is: [1, units, each] int32; `F.length` or more where there is none."""
    unit = tl.arange(0, F.units)[None, :, None]
    place = tl.arange(0, F.each)[None, None, :]
    within = unit * F.wide + place % F.wide
    return tl.where(unit < F.units_held, within + place // F.wide * F.stride, F.length)


@triton.jit
def column_of(place, F: tl.constexpr):
    """The inverse: in which column a code of a row lies."""
    within = place % F.stride
    return within // F.wide * F.each + place // F.stride * F.wide + within % F.wide


@triton.jit
def plane_at(entry, i: tl.constexpr, unit: tl.constexpr):
    """Where plane i of a block begins, as a pointer to units; pages begin, and blocks of them, at multiples of 16 bytes."""
    address = tl.load(entry + i)
    if unit == 32:
        return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
    elif unit == 16:
        return tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def read_codes(entry, head, rows, F: tl.constexpr):
    """Codes of rows [n] of a head of a block: [n, units, each] int32; 0 beyond the last row and column."""
    unit = tl.arange(0, F.units)[None, :]
    place = tl.arange(0, F.each)[None, None, :]
    live = (rows[:, None] < F.rows) & (unit < F.units_held)
    codes = tl.zeros([rows.shape[0], F.units, F.each], tl.int32)
    for i in tl.static_range(len(F.planes)):
        held: tl.constexpr = F.units_held * F.planes[i] // F.order  # units of a row of this plane
        at = (head * F.rows + rows[:, None]) * held + unit % held
        words = tl.load(plane_at(entry, i, F.unit) + at, mask=live, other=0).to(tl.int32)
        shift = place % F.wide * 8 + place // F.wide * F.order + (unit // held * F.planes[i])[:, :, None]
        codes |= ((words[:, :, None] >> shift) & ((1 << F.planes[i]) - 1)) << F.offsets[i]
    return codes


@triton.jit
def levels_of(table, head, rows, number, F: tl.constexpr):
    """Codebooks that `look_up` gathers from: [n, levels] where each code has its own, else [levels].

    number: [n], which of those that a code stands for. table: [heads, codes, levels, numbers], or [levels], float32.
    """
    level = tl.arange(0, F.levels)
    if F.own and F.gathered:
        at = ((head * F.codes + rows[:, None]) * F.levels + level[None, :]) * F.numbers + number[:, None]
        return tl.load(table + at, mask=rows[:, None] < F.codes, other=0.0)
    else:
        return tl.load(table + level)


@triton.jit
def look_up(codes, levels, table, head, rows, number, F: tl.constexpr):
    """What codes [n, units, each] stand for before ranges, float32."""
    live = (rows < F.codes)[:, None, None]
    own = ((head * F.codes + rows) * F.levels * F.numbers + number)[:, None, None]
    if F.even:
        return even_level(codes, F)
    elif F.levels <= 4:
        return select(codes, table, own, live, F)
    elif not F.gathered:
        return tl.load(table + own + codes * F.numbers, mask=live, other=0.0)
    elif F.own:
        return tl.reshape(tl.gather(levels, tl.reshape(codes, [codes.shape[0], F.columns]), 1), codes.shape)
    else:
        return tl.reshape(tl.gather(levels, tl.reshape(codes, [codes.shape[0] * F.columns]), 0), codes.shape)


@triton.jit
def select(codes, table, own, live, F: tl.constexpr):
    """One of four levels, by the code's two bits."""
    if F.own:
        zero = tl.load(table + own, mask=live, other=0.0)
        one = tl.load(table + own + F.numbers, mask=live, other=0.0)
        two = tl.load(table + own + 2 * F.numbers, mask=live, other=0.0)
        three = tl.load(table + own + 3 * F.numbers, mask=live, other=0.0)
    else:
        zero, one, two, three = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    odd = codes & 1 != 0
    return tl.where(codes & 2 != 0, tl.where(odd, three, two), tl.where(odd, one, zero))


@triton.jit
def even_level(codes, F: tl.constexpr):
    """Levels evenly spaced from -1 to 1. A small whole number lies in the last bits of a float32 of 2^23 and more."""
    return ((codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0) * (2.0 / (F.levels - 1)) - 1.0


@triton.jit
def ranges_at(entry, scale, zero, F: tl.constexpr):
    """Where scale and zero lie: with the block, or fixed."""
    if F.ranges == "held":
        scale = tl.load(entry + 3).to(tl.pointer_type(tl.float16))
        zero = tl.load(entry + 4).to(tl.pointer_type(tl.float16))
    return scale, zero


@triton.jit
def range_of(scale, zero, head, token, channel, live, F: tl.constexpr):
    """Scale and zero of numbers, float32; scale, zero: where those of the block's first head lie."""
    at = (head if F.range_heads > 1 else 0) * F.range_tokens * F.range_channels
    if F.range_tokens > 1:
        at += token // (64 // F.range_tokens) * F.range_channels
    if F.range_channels > 1:
        at += channel // (F.dim // F.range_channels)
    stretch = tl.load(scale + at, mask=live, other=0.0).to(tl.float32)
    shift = tl.zeros_like(stretch)
    if F.zero:
        shift = tl.load(zero + at, mask=live, other=0.0).to(tl.float32)
    return stretch, shift


@triton.jit
def stands_for(code, table, scale, zero, head, token, place, number: tl.constexpr, live, F: tl.constexpr):
    """What single codes stand for, float32; place: of each within its head. All broadcast."""
    if F.own:
        at = ((head * F.codes + place) * F.levels + code) * F.numbers + number
        numbers = tl.load(table + at, mask=live, other=0.0)
    elif F.even:
        numbers = even_level(code, F)
    else:
        numbers = tl.load(table + code)
    if F.ranges != "none":
        stretch, shift = range_of(scale, zero, head, token, place, live, F)
        numbers = numbers * stretch + shift
    return numbers


@triton.jit
def to_numbers(codes, levels, entry, table, scale, zero, head, rows, number, F: tl.constexpr):
    """What codes [n, units, each] stand for, but for outliers: [n, columns] float32."""
    numbers = look_up(codes, levels, table, head, rows, number, F)
    if F.ranges != "none":
        row = rows[:, None, None] if F.by_row else tl.zeros([1, 1, 1], tl.int32)
        column = tl.zeros([1, 1, 1], tl.int32)
        if F.by_unit:
            column = column_places(F)
        elif F.by_column:
            column = (tl.arange(0, F.each) // F.wide * F.stride)[None, None, :]
        live = (row < F.rows) & (column < F.length)
        token, channel = (column, row) if F.channel_major else (row, column)
        scale, zero = ranges_at(entry, scale, zero, F)
        stretch, shift = range_of(scale, zero, head, token, channel, live, F)
        numbers = numbers * stretch + shift
    return tl.reshape(numbers, [codes.shape[0], F.columns])


@triton.jit
def missed(entry, table, scale, zero, head, token, code, number: tl.constexpr, exact, live, F: tl.constexpr):
    """By how much the numbers that single codes stand for miss the exact ones: [n] float32."""
    row, column = (code, token) if F.channel_major else (token, code)
    found = tl.zeros_like(code)
    for i in tl.static_range(len(F.planes)):
        held: tl.constexpr = F.length * F.planes[i] // 8  # bytes of a row of this plane
        at = (head * F.rows + row) * held + column % held
        byte = tl.load(plane_at(entry, i, 8) + at, mask=live, other=0).to(tl.int32)
        found |= ((byte >> (column // held * F.planes[i])) & ((1 << F.planes[i]) - 1)) << F.offsets[i]
    scale, zero = ranges_at(entry, scale, zero, F)
    return tl.where(live, exact - stands_for(found, table, scale, zero, head, token, code, number, live, F), 0.0)
