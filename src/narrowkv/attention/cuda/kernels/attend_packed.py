"""Triton: attention over sealed blocks, read where they lie. A program takes a run of blocks of one KV head of one sequence.

Each block is dequantized once for all queries of its group. Keys are rotated relative to the block's first token, by angles
that all blocks share, and queries are rotated back by its position. Sums are in float32; tiles of keys, values and weights in
NUMBER.
"""

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.common import (
    angles,
    cos_sin,
    in_powers_of_2,
    pair_channels,
    read_query,
    seen,
    weigh,
    write_part,
)
from narrowkv.attention.cuda.kernels.lookup import load_levels, look_up, look_up_bytes
from narrowkv.attention.cuda.kernels.outliers import clear_outliers, put_outliers, with_outliers
from narrowkv.attention.cuda.kernels.prefetch import addresses_of, fetch, outlier_range
from narrowkv.attention.cuda.kernels.unpack import column_indices, fitting, ranged, read_codes, read_nibbles

ROTATED_BLOCKS = tl.constexpr(32)  # blocks for which queries are rotated on from one to the next, before they are rotated anew


# elements that change while a cache grows: a kernel would be compiled anew for multiples of 16, and for 1
@triton.jit(do_not_specialize=["batch", "slots", "splits", "rope_state_stride", "padding_stride", "hidden_stride"])
def attend_blocks(
    query, table, starts, bases, lengths, sums, running_max, tiles,
    key_table, key_bytes, key_scale, key_zero, value_table, value_bytes, value_scale, value_zero,
    near, cycles, rope_state, padding, hidden, sink_index,
    batch, slots, splits, rope_state_stride, padding_stride, hidden_batch, hidden_stride, window,
    scaling, softcap, rope_scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """query: [batch, heads, rows, head_dim]. table: [columns, batch, 2, 8] addresses. starts: [columns + 1]; bases: [columns,
    batch] positions of the first tokens. lengths: as `launch` has them.
    near, cycles, rope_state: of `angles`; padding, hidden: of `seen`, for each sequence. Results like those of `write_part`,
    [batch * heads, slots, ..], of which a program fills the slot of its split.
    """
    split, batch_head = tl.program_id(0), tl.program_id(1)
    row, head = batch_head // K.heads, batch_head % K.heads
    rows = tl.program_id(2) * C.capacity + tl.arange(0, C.capacity)
    count, sealed = tl.load(lengths), tl.load(lengths + 1)
    first, query_positions = tl.load(lengths + 2), tl.load(lengths + 3)
    share = (count + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, count)
    rope_state += row.to(tl.int64) * rope_state_stride + tl.load(lengths + 11) * C.rope_state_width
    padding += row.to(tl.int64) * padding_stride
    hidden += (row % hidden_batch).to(tl.int64) * C.queries * hidden_stride

    channel_a, channel_b = pair_channels(C)
    query_a = read_query(query, batch_head, rows, channel_a, scaling, rope_scale, C)
    query_b = read_query(query, batch_head, rows, channel_b, scaling, rope_scale, C)
    size = tl.maximum(tl.max(tl.abs(query_a), 0), tl.max(tl.abs(query_b), 0))  # of a query: so that 16 bits hold it
    size = tl.where(size > 0, size, 1.0)[None, :]
    query_a, query_b = query_a / size, query_b / size
    levels_a = load_levels(key_bytes, head, channel_a, K, ELEMENT)
    levels_b = load_levels(key_bytes, head, channel_b, K, ELEMENT)
    levels_v = load_levels(value_bytes, head, tl.arange(0, V.row_capacity), V, ELEMENT)
    pair = tl.arange(0, C.lanes)
    reached = -(2**31)  # where queries are rotated to, if a block begins there
    if C.rope_mode == "near":
        step_cos, step_sin = cos_sin(pair * 0 + 64, tl.load(cycles + pair, mask=pair < C.pairs, other=0.0))
        step_cos, step_sin = step_cos[:, None], step_sin[:, None]
    token_of = column_indices(K)  # of a row of scores
    if C.rope_mode == "near":
        near_cos, near_sin = angles(pair[:, None], token_of[None, :], (token_of >= 0)[None, :], near, cycles, rope_state, C)
        near_cos, near_sin = near_cos.to(ELEMENT), near_sin.to(ELEMENT)

    program = (tl.program_id(2) * tl.num_programs(1) + batch_head) * splits + split
    key_tile = tiles + program.to(tl.int64) * (K.tile + V.tile)
    value_tile = key_tile + K.tile
    for i in range(0, K.tile + V.tile, 1024):
        within = i + tl.arange(0, 1024)
        tl.store(key_tile + within, tl.full([1024], 0, ELEMENT), mask=within < K.tile + V.tile)
    largest = tl.full([C.capacity], float("-inf"), tl.float32)
    totals = tl.full([K.columns, C.capacity], 0, tl.float32)
    part = tl.full([V.columns, C.capacity], 0, tl.float32)
    for i in range(begin, end):
        entry = table + (i * batch + row) * 16
        start = tl.load(starts + i)
        live = token_of < tl.minimum(tl.load(starts + i + 1), sealed) - start
        if C.rope_mode == "near":
            base = tl.load(bases + i * batch + row)
            if base == reached and (i - begin) % ROTATED_BLOCKS != 0:
                query_a, query_b = query_a * step_cos + query_b * step_sin, query_b * step_cos - query_a * step_sin
            else:
                query_a, query_b = unrotated(query, batch_head, rows, scaling, rope_scale, size, base, cycles, C)
            reached = base + 64
        if K.nonzeros + V.nonzeros > 0:  # such a loop the compiler does not read ahead in
            next_ = table + (tl.minimum(i + 1, end - 1) * batch + row) * 16
            key_next, value_next = addresses_of(next_), addresses_of(next_ + 8)
            tl.debug_barrier()  # until tiles are cleared
        if K.nonzeros > 0:
            key_begin, key_end, key_first = put_outliers(key_tile, entry, head, K)
        if V.nonzeros > 0:
            value_begin, value_end, value_first = put_outliers(value_tile, entry + 8, head, V)
        if K.nonzeros + V.nonzeros > 0:
            tl.debug_barrier()  # until outliers are written
        keys_a, keys_b = read_keys(
            entry, key_tile, levels_a, levels_b, key_table, key_scale, key_zero, head, token_of, K, C, ELEMENT
        )
        if C.rope_mode == "near":
            keys_a, keys_b = keys_a * near_cos - keys_b * near_sin, keys_b * near_cos + keys_a * near_sin
        elif C.rope_mode != "none":
            cos, sin = angles(pair[:, None], start + token_of[None, :], live[None, :], near, cycles, rope_state, C)
            keys_a, keys_b = keys_a * cos - keys_b * sin, keys_b * cos + keys_a * sin
        scores = tl.dot(tl.trans(keys_a.to(ELEMENT)), query_a.to(ELEMENT), input_precision=C.precision)
        scores = tl.dot(tl.trans(keys_b.to(ELEMENT)), query_b.to(ELEMENT), scores, input_precision=C.precision)
        key_from, key_to, value_from, value_to = 0, 0, 0, 0
        if K.nonzeros > 0:
            key_from, key_to = outlier_range(key_next[3], head)
        if V.nonzeros > 0:
            value_from, value_to = outlier_range(value_next[3], head)
        scores = in_powers_of_2(scores * size, softcap, C)
        for j in tl.static_range(tl.constexpr(C.sinks)):
            live &= first + start + token_of != tl.load(sink_index + row * C.sinks + j)
        sees = seen(rows, start + token_of, live, first, query_positions, padding, hidden, hidden_stride, window, C)
        weights, rescale, largest = weigh(tl.where(sees, scores, float("-inf")), largest)
        totals = totals * rescale[None, :] + weights
        values = read_values(entry + 8, value_tile, levels_v, value_table, value_scale, value_zero, head, token_of, V, ELEMENT)
        part = tl.dot(values, weights.to(ELEMENT), part * rescale[None, :], input_precision=C.precision)
        if K.nonzeros + V.nonzeros > 0:
            fetch(key_next, key_from, key_to, head, K)
            fetch(value_next, value_from, value_to, head, V)
            tl.debug_barrier()  # until tiles are read
        if K.nonzeros > 0:
            clear_outliers(key_tile, entry, key_begin, key_end, key_first, K)
        if V.nonzeros > 0:
            clear_outliers(value_tile, entry + 8, value_begin, value_end, value_first, V)
    write_part(sums, running_max, part, tl.sum(totals, 0), largest, column_indices(V), rows, batch_head * slots + split, C)


@triton.jit
def unrotated(query, batch_head, rows, scaling, rope_scale, size, base, cycles, C: tl.constexpr):
    """Queries like those of `attend_blocks`, rotated back by the position of a block's first token."""
    pair = tl.arange(0, C.lanes)
    channel_a, channel_b = pair_channels(C)
    query_a = read_query(query, batch_head, rows, channel_a, scaling, rope_scale, C) / size
    query_b = read_query(query, batch_head, rows, channel_b, scaling, rope_scale, C) / size
    cos, sin = cos_sin(base, tl.load(cycles + pair, mask=pair < C.pairs, other=0.0))
    return query_a * cos[:, None] + query_b * sin[:, None], query_b * cos[:, None] - query_a * sin[:, None]


@triton.jit
def exact_at(entry, head, token, channel, F: tl.constexpr):
    """Exact elements of a block [64, head_dim], for `token` and `channel` that broadcast; 0 beyond the last channel."""
    address = tl.load(entry)
    live = (token >= 0) & (channel < F.dim)
    at = (head * 64 + token) * F.dim + channel
    if F.kind == "fp16":
        return tl.load(tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16) + at, mask=live, other=0.0)
    elif F.kind == "bf16":
        return tl.load(tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16) + at, mask=live, other=0.0)
    else:
        return tl.load(tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + at, mask=live, other=0.0)


@triton.jit
def read_keys(
    entry,
    tile,
    levels_a,
    levels_b,
    table,
    scale,
    zero,
    head,
    token_of,
    K: tl.constexpr,
    C: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """Keys of a block, but for outliers, not rotated: the first and the second channels of pairs, [lanes, 64] each."""
    channel_a, channel_b = pair_channels(C)
    if K.bits == 16:
        keys_a = exact_at(entry, head, token_of[None, :], channel_a[:, None], K)
        keys_b = exact_at(entry, head, token_of[None, :], channel_b[:, None], K)
        return fitting(keys_a, ELEMENT), fitting(keys_b, ELEMENT)
    else:
        codes_a, codes_b = read(entry, head, channel_a, K, ELEMENT), read(entry, head, channel_b, K, ELEMENT)
        keys_a = to_elements(codes_a, levels_a, entry, table, scale, zero, head, channel_a, K, ELEMENT)
        keys_b = to_elements(codes_b, levels_b, entry, table, scale, zero, head, channel_b, K, ELEMENT)
        if K.nonzeros > 0:
            keys_a = with_outliers(keys_a, tile, channel_a, channel_a < K.dim, K)
            keys_b = with_outliers(keys_b, tile, channel_b, channel_b < K.dim, K)
        return keys_a, keys_b


@triton.jit
def read_values(entry, tile, levels, table, scale, zero, head, token_of, V: tl.constexpr, ELEMENT: tl.constexpr):
    """Values of a block, but for outliers: [channels, 64]."""
    if V.bits == 16:
        return fitting(exact_at(entry, head, token_of[None, :], column_indices(V)[:, None], V), ELEMENT)
    else:
        codes = read(entry, head, token_of, V, ELEMENT)
        elements = to_elements(codes, levels, entry, table, scale, zero, head, token_of, V, ELEMENT)
        if V.nonzeros > 0:
            elements = with_outliers(elements, tile, token_of, token_of < 64, V)
        return tl.trans(elements)


@triton.jit
def read(entry, head, rows, F: tl.constexpr, ELEMENT: tl.constexpr):
    """Codes of rows, as `to_elements` looks them up."""
    if F.by_bytes and ELEMENT == tl.float16:  # noqa: SIM300
        return read_nibbles(entry, head, rows, F)
    else:
        return read_codes(entry, head, rows, F)


@triton.jit
def to_elements(codes, levels, entry, table, scale, zero, head, rows, F: tl.constexpr, ELEMENT: tl.constexpr):
    """What codes stand for, but for outliers: [n, columns]."""
    if F.by_bytes and ELEMENT == tl.float16:  # noqa: SIM300
        return ranged(look_up_bytes(codes, levels, F), entry, scale, zero, head, rows, F)
    else:
        return ranged(look_up(codes, table, head, rows, F).to(ELEMENT), entry, scale, zero, head, rows, F)
