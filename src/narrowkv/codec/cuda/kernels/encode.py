"""Triton: what is done to every new token on a GPU: ranges, codes and outliers."""

import triton
import triton.language as tl

from narrowkv.codec.cuda.kernels.ranges import code_of, inner_range


@triton.jit(do_not_specialize=["first", "free"])
def encode_tokens(
    x, skip, codes, scale, zero, index, values, counts, offsets,
    boundaries, fixed_scale, fixed_zero, lower, upper,
    first, capacity, free, x_batch, x_head, x_token, skip_batch,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr, FIXED: tl.constexpr,
    TAIL: tl.constexpr, OUTLIERS: tl.constexpr, SKIPS: tl.constexpr, HAS_OFFSETS: tl.constexpr, BOUNDARIES: tl.constexpr,
):  # fmt: skip
    """One token, this many of its heads TOGETHER: all if they share a range, one if not, any number if ranges are FIXED.

    x: [batch, heads, new, head_dim] by strides, channels side by side. skip: [batch, new], not 0 where no outlier is stored.
    codes: [batch, heads, capacity, head_dim] uint8; the token goes to position `first`, with HAS_OFFSETS offsets[0] behind,
    others behind it. scale, zero: [batch, 1 or heads, capacity, 1] float16, or FIXED by channel, with thresholds lower and
    upper. TAIL: how many outliers each end of a range has. index, values: [free] of outliers, in any order; counts: [2] how
    many there are already, and how many elements do not fit 16 bits or are none.
    """
    row, token, head = tl.program_id(0), tl.program_id(1), tl.program_id(2) * HEADS_PER_PROGRAM
    if HAS_OFFSETS:
        first += tl.load(offsets)
    i = tl.arange(0, WIDE)
    channel = i % DIM
    own = i // DIM + head
    live = i < HEADS_PER_PROGRAM * DIM
    if HEADS % HEADS_PER_PROGRAM:
        live = live & (own < HEADS)
    at = x + row.to(tl.int64) * x_batch + own.to(tl.int64) * x_head + token.to(tl.int64) * x_token + channel
    element = tl.load(at, mask=live, other=0.0).to(tl.float32)
    overflow = tl.sum((live & no_number(element)).to(tl.int32), 0)
    index_of_code = ((row * HEADS + own) * capacity + first + token) * DIM + channel  # in the flattened codes
    of_channel = own * DIM + channel
    if FIXED:
        range_scale = tl.load(fixed_scale + of_channel, mask=live, other=0.0)
        range_zero = tl.load(fixed_zero + of_channel, mask=live, other=0.0)
    else:
        low, high = inner_range(element.to(x.dtype.element_ty), live, TAIL)
        stored_scale, stored_zero = ((high - low) / 2).to(tl.float16), ((high + low) / 2).to(tl.float16)
        of_token = (row if HEADS_PER_PROGRAM == HEADS else row * HEADS + head) * capacity + first + token
        tl.store(scale + of_token, stored_scale)
        tl.store(zero + of_token, stored_zero)
        range_scale, range_zero = stored_scale.to(tl.float32), stored_zero.to(tl.float32)
        overflow += (no_number(range_scale) | no_number(range_zero)).to(tl.int32)
    tl.store(codes + index_of_code, code_of(element, range_scale, range_zero, boundaries, BOUNDARIES), mask=live)
    if OUTLIERS:
        if FIXED:
            low = tl.load(lower + of_channel, mask=live, other=0.0)
            high = tl.load(upper + of_channel, mask=live, other=0.0)
        outside = live & ((element < low) | (element > high))
        if SKIPS:
            outside = outside & (tl.load(skip + row * skip_batch + token) + i * 0 == 0)
        rounded = element.to(values.dtype.element_ty)
        overflow += tl.sum((outside & no_number(rounded.to(tl.float32))).to(tl.int32), 0)
        begin = tl.atomic_add(counts, tl.sum(outside.to(tl.int32), 0))
        to = begin + tl.cumsum(outside.to(tl.int32), 0) - 1
        tl.store(index + to, index_of_code.to(tl.int64), mask=outside & (to < free))
        tl.store(values + to, rounded, mask=outside & (to < free))
    tl.atomic_add(counts + 1, overflow, mask=overflow > 0)


@triton.jit
def no_number(x):
    """Whether x is NaN or infinite."""
    return (x != x) | (tl.abs(x) == float("inf"))


@triton.jit(do_not_specialize=["first"])
def put_tokens(
    x, buffer, counts, offsets, first, tokens, x_batch, x_head, x_token,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    """One token of a head, as it is. x, counts, offsets: like those of `encode_tokens`. buffer: [batch, heads, tokens,
    head_dim].
    """
    row, token, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if HAS_OFFSETS:
        first += tl.load(offsets)
    channel = tl.arange(0, WIDE)
    live = channel < DIM
    at = x + row.to(tl.int64) * x_batch + head.to(tl.int64) * x_head + token.to(tl.int64) * x_token + channel
    element = tl.load(at, mask=live, other=0.0)
    tl.store(buffer + ((row.to(tl.int64) * HEADS + head) * tokens + first + token) * DIM + channel, element, mask=live)
    overflow = tl.sum((live & no_number(element.to(tl.float32))).to(tl.int32), 0)
    tl.atomic_add(counts + 1, overflow, mask=overflow > 0)
