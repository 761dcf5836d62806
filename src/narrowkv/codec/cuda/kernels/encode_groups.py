"""Triton: codes of elements that share a range in groups, of tokens of a channel or of channels of a token, as KIVI has it."""

import triton
import triton.language as tl

from narrowkv.codec.cuda.kernels.ranges import code_of


@triton.jit(do_not_specialize=["first"])
def encode_token_groups(
    x, skip, codes, scale, zero, counts, boundaries, first, capacity, x_batch, x_head, x_token, skip_batch,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, SKIPS: tl.constexpr,
    BOUNDARIES: tl.constexpr,
):  # fmt: skip
    """GROUP tokens of one head, each channel with a range of its own.

    x: [batch, heads, new, head_dim] by strides, channels side by side. skip: [batch, new], not 0 of tokens that ranges leave
    out. codes: [batch, heads, capacity, head_dim] uint8, written from the token `first` on, a multiple of GROUP. scale, zero:
    [batch, heads, capacity / GROUP, head_dim] float16. counts: [2], the second of ranges that do not fit 16 bits.
    """
    row, group, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = group * GROUP + tl.arange(0, GROUP)[:, None]
    channel = tl.arange(0, WIDE)[None, :]
    live = channel < DIM
    at = x + row.to(tl.int64) * x_batch + head.to(tl.int64) * x_head + token.to(tl.int64) * x_token + channel
    element = tl.load(at, mask=live, other=0.0).to(tl.float32)
    lows, highs = element, element
    if SKIPS:
        left_out = tl.load(skip + row * skip_batch + token) != 0
        lows, highs = tl.where(left_out, float("inf"), element), tl.where(left_out, float("-inf"), element)
    of_head = (row * HEADS + head).to(tl.int64) * capacity
    of_group = (of_head // GROUP + first // GROUP + group) * DIM + channel
    range_scale, range_zero = store_range(
        tl.min(lows, 0)[None, :], tl.max(highs, 0)[None, :], live, scale, zero, counts, of_group
    )
    code = code_of(element, range_scale, range_zero, boundaries, BOUNDARIES)
    tl.store(codes + (of_head + first + token) * DIM + channel, code, mask=live)


@triton.jit(do_not_specialize=["first"])
def encode_channel_groups(
    x, codes, scale, zero, counts, boundaries, first, capacity, x_batch, x_head, x_token,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
    BOUNDARIES: tl.constexpr,
):  # fmt: skip
    """All heads of one token, each GROUP of channels with a range of its own.

    GROUPS, WIDE: the powers of 2 from the number of groups of all heads, and from GROUP, on. scale, zero: [batch, heads,
    space, head_dim / GROUP] float16; the rest like those of `encode_token_groups`.
    """
    row, token = tl.program_id(0), tl.program_id(1)
    group, i = tl.arange(0, GROUPS)[:, None], tl.arange(0, WIDE)[None, :]
    head, channel = group * GROUP // DIM, group * GROUP % DIM + i
    any_head = head < HEADS
    live = any_head & (i < GROUP)
    at = x + row.to(tl.int64) * x_batch + head.to(tl.int64) * x_head + token.to(tl.int64) * x_token + channel
    element = tl.load(at, mask=live, other=0.0).to(tl.float32)
    low = tl.min(tl.where(live, element, float("inf")), 1)[:, None]
    high = tl.max(tl.where(live, element, float("-inf")), 1)[:, None]
    of_token = (row * HEADS + head).to(tl.int64) * capacity + first + token
    of_group = of_token * (DIM // GROUP) + group % (DIM // GROUP)
    range_scale, range_zero = store_range(low, high, any_head, scale, zero, counts, of_group)
    code = code_of(element, range_scale, range_zero, boundaries, BOUNDARIES)
    tl.store(codes + of_token * DIM + channel, code, mask=live)


@triton.jit
def store_range(low, high, live, scale, zero, counts, to):
    """Scale and zero of ranges, stored, and returned as stored; 0 of a group of which all is left out."""
    low, high = tl.where(low <= high, low, 0.0), tl.where(low <= high, high, 0.0)
    stored_scale, stored_zero = ((high - low) * 0.5).to(tl.float16), ((high + low) * 0.5).to(tl.float16)
    tl.store(scale + to, stored_scale, mask=live)
    tl.store(zero + to, stored_zero, mask=live)
    range_scale, range_zero = stored_scale.to(tl.float32), stored_zero.to(tl.float32)
    overflow = live & ~((tl.abs(range_scale) < float("inf")) & (tl.abs(range_zero) < float("inf")))
    count = tl.sum(tl.sum(overflow.to(tl.int32), 1), 0)
    tl.atomic_add(counts + 1, count, mask=count > 0)
    return range_scale, range_zero
