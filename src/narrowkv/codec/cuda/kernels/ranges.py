"""Triton: ranges of elements, found and applied."""

import triton
import triton.language as tl


@triton.jit
def code_of(element, range_scale, range_zero, boundaries, BOUNDARIES: tl.constexpr):
    """How many of the ascending boundaries lie below each element, once it is normalized; to 0 where the range is empty."""
    normal = (element - range_zero) * tl.where(
        range_scale > 0, tl.div_rn(1.0, tl.where(range_scale > 0, range_scale, 1.0)), 0.0
    )
    code = tl.zeros(element.shape, tl.int32)
    for j in tl.static_range(BOUNDARIES):
        code = tl.where(normal > tl.load(boundaries + j), j + 1, code)
    return code.to(tl.uint8)


@triton.jit
def inner_range(x, live, TAIL: tl.constexpr):
    """The smallest and the largest element, float32, once TAIL of them are left out at each end.

    The smallest is the largest of which no more than TAIL others are below, found bit by bit from the highest; the largest
    is found likewise from the other side, in the same count, of which it has the upper half.
    """
    if TAIL == 0:
        element = x.to(tl.float32)
        return tl.min(tl.where(live, element, float("inf")), 0), tl.max(tl.where(live, element, float("-inf")), 0)
    BITS: tl.constexpr = 16 if x.dtype.primitive_bitwidth == 16 else 32
    MOST: tl.constexpr = (1 << BITS) - 1
    rank = ranked(x, BITS)
    lows, highs = tl.where(live, rank, MOST), tl.where(live, MOST - rank, MOST)
    low = tl.full((), 0, tl.uint32)
    high = low
    for done in range(BITS):
        bit = tl.full((), 1, tl.uint32) << (BITS - 1 - done)
        below = tl.sum((lows < (low | bit)).to(tl.int32) + ((highs < (high | bit)).to(tl.int32) << 16), 0)
        low, high = tl.where((below & 0xFFFF) <= TAIL, low | bit, low), tl.where((below >> 16) <= TAIL, high | bit, high)
    return unranked(low, x, BITS), unranked(MOST - high, x, BITS)


@triton.jit
def ranked(x, BITS: tl.constexpr):
    """The bits of elements, uint32, so changed that they are ordered as the elements are."""
    MOST: tl.constexpr = (1 << BITS) - 1
    bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) if BITS == 16 else x.to(tl.float32).to(tl.uint32, bitcast=True)
    return tl.where(bits > MOST // 2, MOST - bits, bits + (MOST // 2 + 1))


@triton.jit
def unranked(rank, x, BITS: tl.constexpr):
    """The element, float32, of a rank among elements such as x."""
    MOST: tl.constexpr = (1 << BITS) - 1
    bits = tl.where(rank > MOST // 2, rank - (MOST // 2 + 1), MOST - rank)
    if BITS == 16:
        return bits.to(tl.uint16).to(x.dtype, bitcast=True).to(tl.float32)
    return bits.to(tl.float32, bitcast=True)
