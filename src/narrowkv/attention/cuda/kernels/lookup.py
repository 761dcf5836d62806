"""Triton: what codes stand for before ranges: levels in registers of a thread, else in memory."""

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.unpack import doubled, interleave, picked


@triton.jit
def byte_of_levels(fours, chosen, levels, side: tl.constexpr, F: tl.constexpr):
    """The lower or higher bytes of the levels that four codes name: int32; arguments as in `look_up_bytes`."""
    if F.levels == 4:
        return picked(levels[side], levels[side], fours)
    elif F.levels == 8:
        return picked(levels[2 * side], levels[2 * side + 1], fours)
    else:
        below = picked(levels[4 * side], levels[4 * side + 1], fours)
        above = picked(levels[4 * side + 2], levels[4 * side + 3], fours)
        return picked(below, above, chosen)


@triton.jit
def load_levels(table, head, rows, F: tl.constexpr, ELEMENT: tl.constexpr):
    """Codebooks of rows as `levels_of` has them; 0 where they are read element by element."""
    if F.by_bytes and ELEMENT == tl.float16:  # noqa: SIM300
        return levels_of(table, head, rows, F)
    else:
        return 0


@triton.jit
def levels_of(table, head, rows, F: tl.constexpr):
    """Codebooks of up to 16 levels as bytes in words: the lower bytes of all levels, then the higher, [n, 1] int32 each.

    table: [heads, head_dim, levels / 2] int32, or the one that all share 32 times, [32, levels / 2]: of what is the same for
    all threads the compiler makes a copy at every use.
    """
    words: tl.constexpr = F.levels // 2
    codebook = head * F.dim + rows if F.own else rows % 32
    at = (codebook * words)[:, None]
    live = (rows < F.rows if F.own else rows >= 0)[:, None]
    zero, one = tl.load(table + at, mask=live, other=0), tl.load(table + at + 1, mask=live, other=0)
    if words == 2:
        return zero, one
    else:
        two, three = tl.load(table + at + 2, mask=live, other=0), tl.load(table + at + 3, mask=live, other=0)
        if words == 4:
            return zero, one, two, three
        else:
            four, five = tl.load(table + at + 4, mask=live, other=0), tl.load(table + at + 5, mask=live, other=0)
            six, seven = tl.load(table + at + 6, mask=live, other=0), tl.load(table + at + 7, mask=live, other=0)
            return zero, one, two, three, four, five, six, seven


@triton.jit
def look_up_bytes(words, levels, F: tl.constexpr):
    """What codes stand for before ranges: words [n, m] of eight -> [n, 8 * m] float16, looked up byte by byte in registers."""
    chosen = words
    if F.levels == 16:  # by three bits of each code from either half of the levels, then by the fourth
        chosen = ((words >> 1) & 0x44444444) | 0x32103210
        words = words & 0x77777777
    fours, chosen = doubled(words, 16), doubled(chosen, 16)
    lower, higher = byte_of_levels(fours, chosen, levels, 0, F), byte_of_levels(fours, chosen, levels, 1, F)
    first, last = tl.full(lower.shape, 0x5140, tl.int32), tl.full(lower.shape, 0x7362, tl.int32)
    twos = interleave(picked(lower, higher, first), picked(lower, higher, last))
    return halves(twos)


@triton.jit
def halves(words):
    """Both elements of words [n, m], low one first: [n, 2 * m] float16."""
    return interleave(words.to(tl.int16), (words >> 16).to(tl.int16)).to(tl.float16, bitcast=True)


@triton.jit
def look_up(codes, table, head, rows, F: tl.constexpr):
    """What codes [n, columns] stand for before ranges; table: [heads, head_dim, levels], or [levels]."""
    if F.even:
        return codes.to(tl.float32)
    elif F.own:
        at = ((head * F.dim + rows) * F.levels)[:, None] + codes
        return tl.load(table + at, mask=(rows < F.rows)[:, None], other=0.0)
    else:
        return tl.load(table + codes)
