"""Triton: from packed bytes to tiles of elements.

A row of codes is read as int32 words (bytes where a row is no integer of words), which are taken apart within the
threads that have read them. So a tile's columns come in an order of their own, `column_indices`. Rows of a channel-major side
are channels and columns are tokens; of a token-major side it is the other way round. Tiles are of NUMBER, float16
or float32; two elements of 16 bits take one instruction.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(46_000.0)  # the square root of a half of what float16 holds
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def column_indices(F: tl.constexpr):
    """Index in a row of the code in each column of a tile: [columns] int32; `F.length` or more where there is none."""
    column = tl.arange(0, F.columns)
    unit, within = column // F.each, column % F.each
    if F.wide == 4:  # bits of a column, from the lowest: a half of a byte, the byte, and which codes of the half
        half = within % 2 if F.sharing > 1 else 0
        byte = within // (2 if F.sharing > 1 else 1) % 4
        share = half * 2 + within // 8 if F.sharing == 4 else half
    else:
        byte, share = 0, within
    return tl.where(unit < F.units_stored, unit * F.wide + byte + share * F.stride, F.length)


@triton.jit
def column_of(code, F: tl.constexpr):
    """The inverse: the column of a row's code with this index."""
    unit, byte, share = code % F.stride // F.wide, code % F.stride % F.wide, code // F.stride
    if F.wide == 1:
        within = share
    elif F.sharing == 4:
        within = share % 2 * 8 + byte * 2 + share // 2
    elif F.sharing == 2:
        within = byte * 2 + share
    else:
        within = byte
    return unit * F.each + within


@triton.jit
def plane_at(entry, i: tl.constexpr, wide: tl.constexpr):
    """Where plane i of a block begins, as a pointer to units; blocks begin at multiples of 16 bytes."""
    address = tl.load(entry + i)
    if wide == 4:
        return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def interleave(first, second):
    """Columns of two tiles in turn: [n, m] twice -> [n, 2 * m]."""
    return tl.reshape(tl.join(first, second), [first.shape[0], first.shape[1] * 2])


@triton.jit
def doubled(words, range_zero: tl.constexpr):
    """Each column, then the same shifted: [n, m] -> [n, 2 * m]."""
    return interleave(words, words >> range_zero)


@triton.jit
def read_plane(entry, head, rows, i: tl.constexpr, F: tl.constexpr):
    """Plane i of some rows [n] of a head of a block, a unit for each of the ordering plane: [n, units] int32."""
    unit = tl.arange(0, F.units)[None, :]
    live = (rows[:, None] < F.rows) & (unit < F.units_stored)
    stored: tl.constexpr = F.units_stored * F.planes[i] // F.order  # units of a row of this plane
    at = (head * F.rows + rows[:, None]) * stored + unit % stored
    words = tl.load(plane_at(entry, i, F.wide) + at, mask=live, other=0).to(tl.int32)
    if stored < F.units_stored:
        words = words >> (unit // stored * F.planes[i])
    return words


@triton.jit
def read_nibbles(entry, head, rows, F: tl.constexpr):
    """Codes of up to 4 bits, eight to a word, each in 4 bits: [n, columns / 8] int32."""
    words = nibbles_of(entry, head, rows, 0, F)
    if len(F.planes) > 1:
        words = words | (nibbles_of(entry, head, rows, 1, F) << 2)
    return words


@triton.jit
def nibbles_of(entry, head, rows, i: tl.constexpr, F: tl.constexpr):
    """What plane i has of them."""
    words = read_plane(entry, head, rows, i, F)
    if F.sharing == 4:
        words = doubled(words, 2)
    return words & (((1 << F.planes[i]) - 1) * 0x11111111) if F.planes[i] < 4 else words


@triton.jit
def read_codes(entry, head, rows, F: tl.constexpr):
    """Codes of rows [n] of a head of a block: [n, columns] int32; 0 beyond the last row and column."""
    if F.wide == 4:
        low = tl.full([rows.shape[0], F.columns // (4 if F.sharing == 1 else 8)], 0, tl.int32)
        high = low
        for i in tl.static_range(len(F.planes)):
            words = read_plane(entry, head, rows, i, F)
            if F.sharing == 4:
                words = doubled(words, F.order)
            low |= (words & F.masks[i]) << F.offsets[i]
            high |= ((words >> 4) & F.masks[i]) << F.offsets[i]
        return interleave(taken_apart(low), taken_apart(high)) if F.sharing > 1 else taken_apart(low)
    else:
        codes = tl.full([rows.shape[0], F.columns], 0, tl.int32)
        for i in tl.static_range(len(F.planes)):
            words = read_plane(entry, head, rows, i, F)
            if F.sharing == 4:
                words = doubled(words, 2 * F.order)
            if F.sharing > 1:
                words = doubled(words, F.order)
            codes |= (words & ((1 << F.planes[i]) - 1)) << F.offsets[i]
        return codes


@triton.jit
def taken_apart(words):
    """The four bytes of words [n, m]: [n, 4 * m] int32."""
    return interleave(interleave(byte_of(words, 0), byte_of(words, 2)), interleave(byte_of(words, 1), byte_of(words, 3)))


@triton.jit
def byte_of(words, i: tl.constexpr):
    """A byte of each word."""
    return picked(words, words * 0, tl.full(words.shape, 0x4440 + i, tl.int32))


@triton.jit
def picked(low, high, which):
    """Four bytes of the eight of two words, low ones first, each named by 4 bits (below 8) of the last 16 of `which`."""
    if INTERPRETED:
        found = tl.zeros_like(which)
        for i in tl.static_range(4):
            byte = (which >> (4 * i)) & 7
            found |= ((tl.where(byte < 4, low, high) >> (byte % 4 * 8)) & 255) << (8 * i)
        return found
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, which], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def fitting(elements, ELEMENT: tl.constexpr):
    """Elements as ELEMENT; NaN for those that would overflow when keys are rotated, so that no result hides it."""
    if ELEMENT == tl.float16:  # noqa: SIM300
        elements = tl.where(tl.abs(elements.to(tl.float32)) > LARGEST, float("nan"), elements)
    return elements.to(ELEMENT)


@triton.jit
def ranges_at(entry, scale, zero, F: tl.constexpr):
    """Where scale and zero lie: with the block, or fixed."""
    if F.ranges == "stored":
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
    range_scale = tl.load(scale + at, mask=live, other=0.0).to(tl.float32)
    range_zero = tl.zeros_like(range_scale)
    if F.zero:
        range_zero = tl.load(zero + at, mask=live, other=0.0).to(tl.float32)
    if F.even:  # levels of even steps from -1 to 1
        return range_scale * (2.0 / (F.levels - 1)), range_zero - range_scale
    else:
        return range_scale, range_zero


@triton.jit
def ranged(elements, entry, scale, zero, head, rows, F: tl.constexpr):
    """Elements [n, columns] with their ranges, if there are any."""
    ELEMENT: tl.constexpr = elements.dtype
    if F.ranges != "none":
        scale, zero = ranges_at(entry, scale, zero, F)
        row = rows[:, None] if F.by_row else tl.full([1, 1], 0, tl.int32)
        if F.by_row and F.by_column and F.groups <= 8:
            index = column_indices(F)[None, :]
            for i in tl.static_range(tl.constexpr(F.groups)):
                some, more = range_in(scale, zero, head, row, row * 0 + i * F.group_size, ELEMENT, F)
                if i == 0:
                    range_scale, range_zero = some, more
                else:
                    range_scale = tl.where(index // F.group_size == i, some, range_scale)
                    range_zero = tl.where(index // F.group_size == i, more, range_zero)
        else:
            column = column_indices(F)[None, :] if F.by_column else tl.full([1, 1], 0, tl.int32)
            range_scale, range_zero = range_in(scale, zero, head, row, column, ELEMENT, F)
        elements = fused(elements, range_scale, range_zero)
    return elements


@triton.jit
def fused(x, y, z):
    """x * y + z, of elements of 16 bits two at once, which the compiler by itself takes apart and packs again."""
    if INTERPRETED or x.dtype != tl.float16:
        return x * y + z
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def range_in(scale, zero, head, row, column, ELEMENT: tl.constexpr, F: tl.constexpr):
    """`range_of` rows and columns that broadcast, as ELEMENT; NaN where elements may be too large for `fitting`.

    Not so of values by token, which are not rotated: where they overflow, infinity shows in the result.
    """
    live = (row < F.rows) & (column < F.length)
    token, channel = row, column
    if F.channel_major:
        token, channel = column, row
    range_scale, range_zero = range_of(scale, zero, head, token, channel, live, F)
    if F.channel_major and ELEMENT == tl.float16:  # noqa: SIM300
        furthest = tl.abs(range_zero) + tl.abs(range_scale) * (F.levels - 1 if F.even else 1)
        range_zero = tl.where(furthest > LARGEST, float("nan"), range_zero)
    return range_scale.to(ELEMENT), range_zero.to(ELEMENT)


@triton.jit
def stands_for(code, table, scale, zero, head, token, channel, live, F: tl.constexpr):
    """What single codes stand for, float32. All broadcast."""
    if F.own:
        at = (head * F.dim + channel) * F.levels + code
        elements = tl.load(table + at, mask=live, other=0.0).to(tl.float32)
    elif F.even:
        elements = code.to(tl.float32)
    else:
        elements = tl.load(table + code).to(tl.float32)
    if F.ranges != "none":
        range_scale, range_zero = range_of(scale, zero, head, token, channel, live, F)
        elements = elements * range_scale + range_zero
    return elements
