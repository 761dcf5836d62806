"""Triton: the open tail as numbers, from codes of a byte each; then its outliers, each by a thread of its own."""

import triton
import triton.language as tl

from narrowkv.attention.triton_tiles import stands_for

TOKENS = tl.constexpr(8)  # a program
OUTLIERS = tl.constexpr(128)  # a program


@triton.jit
def decode_tail(codes, table, scale, zero, numbers, F: tl.constexpr, WIDE: tl.constexpr):
    """codes: [batch, heads, 64, codes] uint8; scale, zero: held or fixed. numbers: [batch, heads, 64, head_dim]."""
    place = tl.program_id(0)
    head = place % F.heads
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    code = tl.arange(0, WIDE)[None, :]
    live = (token < 64) & (code < F.codes)
    found = tl.load(codes + (place * 64 + token) * F.codes + code, mask=live, other=0).to(tl.int32)
    if F.ranges == "held":
        first = place // F.heads * F.range_heads * F.range_tokens * F.range_channels
        scale += first
        zero += first
    for number in tl.static_range(tl.constexpr(F.numbers)):
        decoded = stands_for(found, table, scale, zero, head, token, code, number, live, F)
        at = (place * 64 + token) * F.dim + code + number * F.codes
        tl.store(numbers + at, decoded, mask=live)


@triton.jit
def put_outliers(index, values, count, numbers, F: tl.constexpr):
    """Write count[0] outliers of the tail; index: [..] int64 in the flattened codes; values: [.., numbers]."""
    which = tl.program_id(0) * OUTLIERS + tl.arange(0, OUTLIERS)
    live = which < tl.load(count)
    at = tl.load(index + which, mask=live, other=0)
    for number in tl.static_range(tl.constexpr(F.numbers)):
        exact = tl.load(values + which * F.numbers + number, mask=live, other=0.0).to(tl.float32)
        tl.store(numbers + at // F.codes * F.dim + at % F.codes + number * F.codes, exact, mask=live)
