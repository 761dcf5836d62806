"""Triton: the open tail as elements, from codes of a byte each, with its outliers."""

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.unpack import stands_for

TOKENS = tl.constexpr(8)  # a program
OUTLIERS = tl.constexpr(128)  # at a time


@triton.jit
def dequantize_tail(
    key_codes, key_table, key_scale, key_zero, key_index, key_outliers, key_count, keys,
    value_codes, value_table, value_scale, value_zero, value_index, value_outliers, value_count, values,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Some tokens of a head: keys, or values; a side that is exact is left alone. Parameters like those of
    `dequantize_part`.
    """
    if tl.program_id(2) == 0:
        if K.bits < 16:
            dequantize_part(key_codes, key_table, key_scale, key_zero, key_index, key_outliers, key_count, keys, K)
    else:
        if V.bits < 16:
            dequantize_part(
                value_codes, value_table, value_scale, value_zero, value_index, value_outliers, value_count, values, V
            )


@triton.jit
def dequantize_part(codes, table, scale, zero, index, outliers, count, elements, F: tl.constexpr):
    """codes: [batch, heads, 64, head_dim] uint8; scale, zero: stored or fixed. index: [..] int64 in the flattened codes;
    outliers: [..], of which count[0] count, in any order. elements: [batch, heads, 64, head_dim].
    """
    batch_head = tl.program_id(0)
    head = batch_head % F.heads
    first = tl.program_id(1) * TOKENS
    token = first + tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, F.code_capacity)[None, :]
    live = (token < 64) & (channel < F.dim)
    found = tl.load(codes + (batch_head * 64 + token) * F.dim + channel, mask=live, other=0).to(tl.int32)
    if F.ranges == "stored":
        first_range = batch_head // F.heads * F.range_heads * F.range_tokens * F.range_channels
        scale += first_range
        zero += first_range
    decoded = stands_for(found, table, scale, zero, head, token, channel, live, F)
    tl.store(elements + (batch_head * 64 + token) * F.dim + channel, decoded, mask=live)
    if F.nonzeros > 0:
        tl.debug_barrier()  # outliers are written after what their codes stand for
        begin = (batch_head * 64 + first).to(tl.int64) * F.dim
        for start in range(0, tl.load(count), OUTLIERS):
            which = start + tl.arange(0, OUTLIERS)
            at = tl.load(index + which, mask=which < tl.load(count), other=-1)
            own = (at >= begin) & (at < begin + TOKENS * F.dim)
            exact = tl.load(outliers + which, mask=own, other=0.0).to(tl.float32)
            tl.store(elements + at, exact, mask=own)
