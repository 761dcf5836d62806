"""Triton: from trellis-coded streams to tiles of grid steps.

A coefficient's state is the 8 bits that end with its code, within two bytes of the stream; what it stands for is the sum of
what both halves of a state stand for. A block has byte i of the streams of its 64 tokens side by side, so a word is the same
byte of four tokens. In 16 bits all of that is done by words: states of four tokens of a frame and of four of the next become
two words of nibbles, these select bytes of tables in registers, four at a time, and bytes become float16 by bits above them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.lookup import halves
from narrowkv.attention.cuda.kernels.unpack import INTERPRETED, doubled, fused, picked


class StreamCodes(NamedTuple):
    """What `stream_tables.StreamTables` has of codes: pointers."""

    p_codes: object
    p_entries: object
    p_finer: object


class Blocks(NamedTuple):
    """Where blocks lie: pointers to addresses [columns, batch, 2, 8], first tokens [columns + 1], and their positions."""

    p_table: object
    p_starts: object
    p_bases: object


def codes_of(side: Any) -> StreamCodes:
    """Of `stream_tables.StreamTables`, or of what has the same names."""
    return StreamCodes(side.codes, side.entries, side.finer)


@triton.jit
def code_rows(codes, rows, ELEMENT: tl.constexpr, F: tl.constexpr):
    """What `read_steps` needs of coefficients [n]: [n, 1] int32 each; those without codes have zeros.

    Where their last byte is, by how many bits they end before it does, which bits of a state are that byte's, the least entry,
    where entries of their rate are; in float16 also four words of what lower nibbles stand for, and of upper ones.
    """
    at = codes.p_codes + rows[:, None]
    live = (rows < F.codes)[:, None]
    byte, shift, own = code_field(at, 0, live, F), code_field(at, 1, live, F), code_field(at, 2, live, F)
    least, entries = code_field(at, 3, live, F), code_field(at, 4, live, F)
    if ELEMENT == tl.float16:  # noqa: SIM300
        zero, one, two, three = nibble_table(at, 8, live, F)
        four, five, six, seven = nibble_table(at, 12, live, F)
        return byte, shift, own, least, entries, zero, one, two, three, four, five, six, seven
    else:
        return byte, shift, own, least, entries


@triton.jit
def code_field(at, field: tl.constexpr, live, F: tl.constexpr):
    """A field of coefficients."""
    return tl.load(at + field * F.codes, mask=live, other=0)


@triton.jit
def nibble_table(at, field: tl.constexpr, live, F: tl.constexpr):
    """Four of them."""
    zero, one = code_field(at, field, live, F), code_field(at, field + 1, live, F)
    return zero, one, code_field(at, field + 2, live, F), code_field(at, field + 3, live, F)


@triton.jit
def read_steps(entry, head, rows, found, codes, ELEMENT: tl.constexpr, F: tl.constexpr):
    """Coefficients `rows` [n] of a head of a block, but for outliers, in grid steps, 0 without codes.

    entry: of the block's side. found: of `code_rows`. Returns even and odd frames [n, 32] float16, or all [n, 64] float32.
    """
    live = (rows < F.codes)[:, None]
    if ELEMENT == tl.float16:  # noqa: SIM300
        even, odd = four_states(entry, head, found, 0, live, F), four_states(entry, head, found, 4, live, F)
        lower = (even & 0x0F0F0F0F) | ((odd << 4) & -0x0F0F0F10)
        upper = ((even >> 4) & 0x0F0F0F0F) | (odd & -0x0F0F0F10)
        entries = bytes_of(lower, found[5], found[6], found[7], found[8])
        entries += bytes_of(upper, found[9], found[10], found[11], found[12])  # 7 bits at most: nothing is carried
        least = (found[3] - 1024).to(tl.float16)
        return to_halves(entries, 0x4240, least), to_halves(entries, 0x4341, least)
    else:
        address = tl.load(entry).to(tl.pointer_type(tl.uint8))
        at = address + (head * F.stream_bytes + found[0]) * 64 + tl.arange(0, 64)[None, :]
        steps = step_by_step(at, 64, found, codes, live)
        return steps, steps


@triton.jit
def four_states(entry, head, found, word: tl.constexpr, live, F: tl.constexpr):
    """States of coefficients at four tokens in each word, of every other frame, from the word `word` on: [n, 8] int32."""
    address = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
    unit = tl.arange(0, 8)[None, :]
    at = address + (head * F.stream_bytes + found[0]) * 16 + unit // 4 * 8 + unit % 4 + word
    last = tl.load(at, mask=live, other=0)
    before = tl.load(at - 16, mask=live & (found[0] > 0), other=0)
    return ((last >> found[1]) & found[2]) | ((before << (8 - found[1])) & ~found[2])


@triton.jit
def to_halves(entries, which: tl.constexpr, least):
    """Two bytes of each word [n, m], and least - 1024 [n, 1], as [n, 2 * m] float16: with bits above them, bytes are 1024
    more than they are.
    """
    words = picked(entries, entries * 0 + 0x64646464, entries * 0 + which)
    return fused(halves(words), tl.full([1, 1], 1.0, tl.float16), least)


@triton.jit
def joined(even, odd, ELEMENT: tl.constexpr):
    """Even and odd frames, as `read_steps` returns them: [n, 64] in the order of tokens."""
    if ELEMENT == tl.float16:  # noqa: SIM300
        n: tl.constexpr = even.shape[0]
        both = tl.join(tl.reshape(even, [n, 2, 16]), tl.reshape(odd, [n, 2, 16]))
        return tl.reshape(tl.permute(both, (0, 1, 3, 2)), [n, 64])
    else:
        return even


@triton.jit
def bytes_of(nibbles, zero, one, two, three):
    """The bytes of 16 in four words [n, 1], of 7 bits each, that nibbles [n, m], eight to a word, select: [n, 2 * m] words."""
    lower, upper = doubled(nibbles, 16), doubled(nibbles ^ -0x77777778, 16)
    return picked_or_zero(zero, one, lower) + picked_or_zero(two, three, upper)


@triton.jit
def picked_or_zero(low, high, which):
    """Like `picked`, of bytes of 7 bits; 0 where 4 bits of `which` are 8 or more: prmt repeats a byte's sign there."""
    if INTERPRETED:
        above = (which >> 3) & 0x1111
        spread = (above & 1) | ((above & 0x10) << 4) | ((above & 0x100) << 8) | ((above & 0x1000) << 12)
        return picked(low, high, which) & ~(spread * 255)
    else:
        return picked(low, high, which)


@triton.jit
def step_by_step(at, STRIDE: tl.constexpr, found, codes, live):
    """Grid steps of coefficients whose last bytes are there, one load each: float32; bytes of a stream are STRIDE apart."""
    last = tl.load(at, mask=live, other=0).to(tl.int32)
    before = tl.load(at - STRIDE, mask=live & (found[0] > 0), other=0).to(tl.int32)
    state = (((before << 8) | last) >> found[1]) & 255
    return tl.load(codes.p_entries + found[4] + state, mask=live, other=0.0)


@triton.jit
def norms_of(entry, head, token, live, F: tl.constexpr):
    """Norms of tokens [64], as parts of the largest, and that: float32; of those that are not live any up to 1."""
    if F.norms:
        address = tl.load(entry).to(tl.pointer_type(tl.uint8))
        code = tl.load(address + (head * F.stream_bytes + F.stream_bytes - 1) * 64 + token).to(tl.float32)
        largest = tl.max(tl.where(live, code, 0.0), 0)
        return norm_of(tl.minimum(code, largest) - largest + 128), norm_of(largest)
    else:
        return tl.full([64], 1.0, tl.float32), 1.0


@triton.jit
def norm_of(code):
    """Norms of codes (codec/quantizers/trellis.py)."""
    return tl.exp2((code - 128) / 16)


@triton.jit
def by_frames(columns):
    """[n, 64] -> [4, 16, n], frames and their tokens."""
    return tl.reshape(tl.trans(columns), [4, 16, columns.shape[0]])
