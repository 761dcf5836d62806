"""Triton: from packed bytes to tiles of numbers.

A row of codes is read as words of 32 bits (bytes where a row is no whole number of words), and taken apart by shifts: each word
doubles again and again within the thread that has read it, until every code has 16 bits. So a tile's columns come in an order of
their own, `column_places`. Rows of a channel-major side are channels (or pairs) and columns are tokens; of a token-major side it
is the other way round. Arithmetic is in NUMBER, float16 or float32: two numbers of 16 bits take one instruction.
"""

import triton
import triton.language as tl


@triton.jit
def column_places(F: tl.constexpr):
    """Which code of a row each column of a tile is: [columns] int32; `F.length` or more where there is none."""
    column = tl.arange(0, F.columns)
    unit, within = column // F.each, column % F.wide
    byte = within // 2 + within % 2 * 2 if F.wide == 4 else within  # halves of a word are taken apart last
    place = unit * F.wide + byte + column // F.wide % F.sharing * F.stride
    return tl.where(unit < F.units_held, place, F.length)


@triton.jit
def column_of(place, F: tl.constexpr):
    """The inverse: in which column a code of a row lies."""
    byte = place % F.stride % F.wide
    within = byte % 2 * 2 + byte // 2 if F.wide == 4 else byte
    return (place % F.stride // F.wide * F.sharing + place // F.stride) * F.wide + within


@triton.jit
def plane_at(entry, i: tl.constexpr, wide: tl.constexpr):
    """Where plane i of a block begins, as a pointer to units; blocks begin at multiples of 16 bytes."""
    address = tl.load(entry + i)
    if wide == 4:
        return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def doubled(words, shift: tl.constexpr):
    """Each column beside itself, shifted: [n, m] -> [n, 2 * m]."""
    return tl.reshape(tl.join(words, words >> shift), [words.shape[0], words.shape[1] * 2])


@triton.jit
def read_codes(entry, head, rows, F: tl.constexpr):
    """Codes of rows [n] of a head of a block: [n, columns] int16; 0 beyond the last row and column."""
    unit = tl.arange(0, F.units)[None, :]
    live = (rows[:, None] < F.rows) & (unit < F.units_held)
    codes = tl.zeros([rows.shape[0], F.columns // 2 if F.wide == 4 else F.columns], tl.int32)
    for i in tl.static_range(len(F.planes)):
        held: tl.constexpr = F.units_held * F.planes[i] // F.order  # units of a row of this plane
        at = (head * F.rows + rows[:, None]) * held + unit % held
        words = tl.load(plane_at(entry, i, F.wide) + at, mask=live, other=0).to(tl.int32)
        if held < F.units_held:
            words = words >> (unit // held * F.planes[i])
        if F.sharing == 4:
            words = doubled(words, 2 * F.order)
        if F.sharing >= 2:
            words = doubled(words, F.order)
        mask: tl.constexpr = (1 << F.planes[i]) - 1
        if F.wide == 4:
            codes |= (doubled(words, 8) & (mask * 0x10001)) << F.offsets[i]
        else:
            codes |= (words & mask) << F.offsets[i]
    if F.wide == 4:
        both = tl.join(codes.to(tl.int16), (codes >> 16).to(tl.int16))
        return tl.reshape(both, [rows.shape[0], F.columns])
    else:
        return codes.to(tl.int16)


@triton.jit
def as_numbers(codes, NUMBER: tl.constexpr):
    """Codes as numbers: a small whole number lies in the last bits of a float16 of 1024 and more."""
    if NUMBER == tl.float16:
        return (codes | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    else:
        return codes.to(tl.float32)


@triton.jit
def cubic_of(table, head, rows, number, F: tl.constexpr, NUMBER: tl.constexpr):
    """Coefficients of the cubic through four levels, [n, 1] each; of no use where there are more.

    number: [n], which of those that a code stands for. table: [heads, codes, levels, numbers], or [levels].
    """
    at = ((head * F.codes + rows) * F.levels * F.numbers + number)[:, None] if F.own else rows[:, None] * 0
    live = (rows < F.rows)[:, None] if F.own else (rows >= 0)[:, None]
    step = F.numbers if F.own else 1
    zero = tl.load(table + at, mask=live, other=0.0).to(tl.float32)
    one = tl.load(table + at + step, mask=live, other=0.0).to(tl.float32)
    two = tl.load(table + at + 2 * step, mask=live, other=0.0).to(tl.float32)
    three = tl.load(table + at + 3 * step, mask=live, other=0.0).to(tl.float32)
    second, third = (two - 2 * one + zero) / 2, (three - 3 * two + 3 * one - zero) / 6
    linear = one - zero - second + 2 * third
    return zero.to(NUMBER), linear.to(NUMBER), (second - 3 * third).to(NUMBER), third.to(NUMBER)


@triton.jit
def look_up(codes, cubic, table, head, rows, number, F: tl.constexpr, NUMBER: tl.constexpr):
    """What codes [n, columns] stand for before ranges."""
    if F.even:
        return as_numbers(codes, NUMBER)
    elif F.levels == 4:
        x = as_numbers(codes, NUMBER)
        return ((cubic[3] * x + cubic[2]) * x + cubic[1]) * x + cubic[0]
    elif F.own:
        at = ((head * F.codes + rows) * F.levels * F.numbers + number)[:, None] + codes.to(tl.int32) * F.numbers
        return tl.load(table + at, mask=(rows < F.rows)[:, None], other=0.0).to(NUMBER)
    else:
        return tl.load(table + codes.to(tl.int32)).to(NUMBER)


@triton.jit
def ranges_at(entry, scale, zero, F: tl.constexpr):
    """Where scale and zero lie: with the block, or fixed."""
    if F.ranges == "held":
        scale = tl.load(entry + 3).to(tl.pointer_type(tl.float16))
        zero = tl.load(entry + 4).to(tl.pointer_type(tl.float16))
    return scale, zero


@triton.jit
def range_of(scale, zero, head, token, channel, live, F: tl.constexpr):
    """What codes, or levels, are multiplied by, and what is added, float32; scale, zero: of the block's first head."""
    at = (head if F.range_heads > 1 else 0) * F.range_tokens * F.range_channels
    if F.range_tokens > 1:
        at += token // (64 // F.range_tokens) * F.range_channels
    if F.range_channels > 1:
        at += channel // (F.dim // F.range_channels)
    stretch = tl.load(scale + at, mask=live, other=0.0).to(tl.float32)
    shift = tl.zeros_like(stretch)
    if F.zero:
        shift = tl.load(zero + at, mask=live, other=0.0).to(tl.float32)
    if F.even:  # levels of even steps from -1 to 1
        return stretch * (2.0 / (F.levels - 1)), shift - stretch
    else:
        return stretch, shift


@triton.jit
def to_numbers(codes, cubic, entry, table, scale, zero, head, rows, number, F: tl.constexpr, NUMBER: tl.constexpr):
    """What codes [n, columns] stand for, but for outliers: [n, columns] NUMBER."""
    numbers = look_up(codes, cubic, table, head, rows, number, F, NUMBER)
    if F.ranges != "none":
        scale, zero = ranges_at(entry, scale, zero, F)
        row = rows[:, None] if F.by_row else tl.zeros([1, 1], tl.int32)
        if F.by_row and F.by_column and F.groups <= 8:
            place = column_places(F)[None, :]
            for i in tl.static_range(tl.constexpr(F.groups)):
                some, more = range_in(scale, zero, head, row, row * 0 + i * F.group, F)
                if i == 0:
                    stretch, shift = some.to(NUMBER), more.to(NUMBER)
                else:
                    stretch = tl.where(place // F.group == i, some.to(NUMBER), stretch)
                    shift = tl.where(place // F.group == i, more.to(NUMBER), shift)
        else:
            column = column_places(F)[None, :] if F.by_column else tl.zeros([1, 1], tl.int32)
            stretch, shift = range_in(scale, zero, head, row, column, F)
        numbers = numbers * stretch.to(NUMBER) + shift.to(NUMBER)
    return numbers


@triton.jit
def range_in(scale, zero, head, row, column, F: tl.constexpr):
    """`range_of` rows and columns that broadcast."""
    live = (row < F.rows) & (column < F.length)
    if F.channel_major:
        return range_of(scale, zero, head, column, row, live, F)
    else:
        return range_of(scale, zero, head, row, column, live, F)


@triton.jit
def stands_for(code, table, scale, zero, head, token, place, number: tl.constexpr, live, F: tl.constexpr):
    """What single codes stand for, float32; place: of each within its head. All broadcast."""
    if F.own:
        at = ((head * F.codes + place) * F.levels + code) * F.numbers + number
        numbers = tl.load(table + at, mask=live, other=0.0).to(tl.float32)
    elif F.even:
        numbers = code.to(tl.float32)
    else:
        numbers = tl.load(table + code).to(tl.float32)
    if F.ranges != "none":
        stretch, shift = range_of(scale, zero, head, token, place, live, F)
        numbers = numbers * stretch + shift
    return numbers


@triton.jit
def missed(entry, table, scale, zero, head, token, code, number: tl.constexpr, exact, live, F: tl.constexpr):
    """By how much the numbers that single codes stand for miss the exact ones: [n] float32."""
    row, column = token, code
    if F.channel_major:
        row, column = code, token
    found = tl.zeros_like(code)
    for i in tl.static_range(len(F.planes)):
        held: tl.constexpr = F.length * F.planes[i] // 8  # bytes of a row of this plane
        at = (head * F.rows + row) * held + column % held
        byte = tl.load(plane_at(entry, i, 1) + at, mask=live, other=0).to(tl.int32)
        found |= ((byte >> (column // held * F.planes[i])) & ((1 << F.planes[i]) - 1)) << F.offsets[i]
    scale, zero = ranges_at(entry, scale, zero, F)
    return tl.where(live, exact - stands_for(found, table, scale, zero, head, token, code, number, live, F), 0.0)
