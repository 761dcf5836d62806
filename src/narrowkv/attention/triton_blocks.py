"""Triton: attention over sealed blocks, read where they lie. A program takes a run of blocks of one KV head of one sequence.

Each block is decoded once for all queries of its group. Keys are turned relative to the block's first token, by angles that
all blocks share, and queries are turned back by its position. Sums are in float32; tiles of keys, values and weights in
NUMBER.
"""

import triton
import triton.language as tl

from narrowkv.attention.triton_fetch import addresses_of, fetch, outlier_range
from narrowkv.attention.triton_lookup import held_levels, look_up, look_up_bytes
from narrowkv.attention.triton_outliers import clear_outliers, put_outliers, with_outliers
from narrowkv.attention.triton_rows import angles, cos_sin, in_twos, pair_channels, read_query, seen, weigh, write_part
from narrowkv.attention.triton_tiles import column_places, fitting, ranged, read_codes, read_nibbles

TURNS = tl.constexpr(32)  # blocks for which queries are turned on from one to the next, before they are turned anew


# numbers that change while a cache grows: a kernel would be compiled anew for multiples of 16, and for 1
@triton.jit(do_not_specialize=["batch", "slots", "splits", "kept_stride", "padding_stride", "hidden_stride"])
def attend_blocks(
    query, table, starts, bases, lengths, sums, peaks, tiles,
    key_table, key_bytes, key_scale, key_zero, value_table, value_bytes, value_scale, value_zero,
    near, turns, kept, padding, hidden, sink_index,
    batch, slots, splits, kept_stride, padding_stride, hidden_batch, hidden_stride, window,
    scaling, softcap, stretch,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """query: [batch, heads, rows, head_dim]. table: [columns, batch, 2, 8] addresses. starts: [columns + 1]; bases: [columns,
    batch] positions of the first tokens. lengths: as `triton_launch` has them.
    near, turns, kept: of `angles`; padding, hidden: of `seen`, for each sequence. Results as of `write_part`, [batch * heads,
    slots, ..], of which a program fills the slot of its split.
    """
    split, place = tl.program_id(0), tl.program_id(1)
    row, head = place // K.heads, place % K.heads
    rows = tl.program_id(2) * C.room + tl.arange(0, C.room)
    count, sealed = tl.load(lengths), tl.load(lengths + 1)
    first, asking = tl.load(lengths + 2), tl.load(lengths + 3)
    share = (count + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, count)
    kept += row.to(tl.int64) * kept_stride + tl.load(lengths + 11) * C.kept_width
    padding += row.to(tl.int64) * padding_stride
    hidden += (row % hidden_batch).to(tl.int64) * C.queries * hidden_stride

    channel_a, channel_b = pair_channels(C)
    query_a = read_query(query, place, rows, channel_a, scaling, stretch, C)
    query_b = read_query(query, place, rows, channel_b, scaling, stretch, C)
    size = tl.maximum(tl.max(tl.abs(query_a), 0), tl.max(tl.abs(query_b), 0))  # of a query: so that 16 bits hold it
    size = tl.where(size > 0, size, 1.0)[None, :]
    query_a, query_b = query_a / size, query_b / size
    levels_a = held_levels(key_bytes, head, channel_a, K, NUMBER)
    levels_b = held_levels(key_bytes, head, channel_b, K, NUMBER)
    levels_v = held_levels(value_bytes, head, tl.arange(0, V.row_room), V, NUMBER)
    pair = tl.arange(0, C.lanes)
    reached = -(2**31)  # where queries are turned to, if a block begins there
    if C.turning == "near":
        step_cos, step_sin = cos_sin(pair * 0 + 64, tl.load(turns + pair, mask=pair < C.pairs, other=0.0))
        step_cos, step_sin = step_cos[:, None], step_sin[:, None]
    token_of = column_places(K)  # of a row of scores
    if C.turning == "near":
        near_cos, near_sin = angles(pair[:, None], token_of[None, :], (token_of >= 0)[None, :], near, turns, kept, C)
        near_cos, near_sin = near_cos.to(NUMBER), near_sin.to(NUMBER)

    program = (tl.program_id(2) * tl.num_programs(1) + place) * splits + split
    key_tile = tiles + program.to(tl.int64) * (K.tile + V.tile)
    value_tile = key_tile + K.tile
    for i in range(0, K.tile + V.tile, 1024):
        within = i + tl.arange(0, 1024)
        tl.store(key_tile + within, tl.full([1024], 0, NUMBER), mask=within < K.tile + V.tile)
    largest = tl.full([C.room], float("-inf"), tl.float32)
    totals = tl.full([K.columns, C.room], 0, tl.float32)
    part = tl.full([V.columns, C.room], 0, tl.float32)
    for i in range(begin, end):
        entry = table + (i * batch + row) * 16
        start = tl.load(starts + i)
        live = token_of < tl.minimum(tl.load(starts + i + 1), sealed) - start
        if C.turning == "near":
            base = tl.load(bases + i * batch + row)
            if base == reached and (i - begin) % TURNS != 0:
                query_a, query_b = query_a * step_cos + query_b * step_sin, query_b * step_cos - query_a * step_sin
            else:
                query_a, query_b = turned_back(query, place, rows, scaling, stretch, size, base, turns, C)
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
            entry, key_tile, levels_a, levels_b, key_table, key_scale, key_zero, head, token_of, K, C, NUMBER
        )
        if C.turning == "near":
            keys_a, keys_b = keys_a * near_cos - keys_b * near_sin, keys_b * near_cos + keys_a * near_sin
        elif C.turning != "none":
            cos, sin = angles(pair[:, None], start + token_of[None, :], live[None, :], near, turns, kept, C)
            keys_a, keys_b = keys_a * cos - keys_b * sin, keys_b * cos + keys_a * sin
        scores = tl.dot(tl.trans(keys_a.to(NUMBER)), query_a.to(NUMBER), input_precision=C.precision)
        scores = tl.dot(tl.trans(keys_b.to(NUMBER)), query_b.to(NUMBER), scores, input_precision=C.precision)
        key_from, key_to, value_from, value_to = 0, 0, 0, 0
        if K.nonzeros > 0:
            key_from, key_to = outlier_range(key_next[3], head)
        if V.nonzeros > 0:
            value_from, value_to = outlier_range(value_next[3], head)
        scores = in_twos(scores * size, softcap, C)
        for j in tl.static_range(tl.constexpr(C.sinks)):
            live &= first + start + token_of != tl.load(sink_index + row * C.sinks + j)
        sees = seen(rows, start + token_of, live, first, asking, padding, hidden, hidden_stride, window, C)
        weights, fading, largest = weigh(tl.where(sees, scores, float("-inf")), largest)
        totals = totals * fading[None, :] + weights
        values = read_values(entry + 8, value_tile, levels_v, value_table, value_scale, value_zero, head, token_of, V, NUMBER)
        part = tl.dot(values, weights.to(NUMBER), part * fading[None, :], input_precision=C.precision)
        if K.nonzeros + V.nonzeros > 0:
            fetch(key_next, key_from, key_to, head, K)
            fetch(value_next, value_from, value_to, head, V)
            tl.debug_barrier()  # until tiles are read
        if K.nonzeros > 0:
            clear_outliers(key_tile, entry, key_begin, key_end, key_first, K)
        if V.nonzeros > 0:
            clear_outliers(value_tile, entry + 8, value_begin, value_end, value_first, V)
    write_part(sums, peaks, part, tl.sum(totals, 0), largest, column_places(V), rows, place * slots + split, C)


@triton.jit
def turned_back(query, place, rows, scaling, stretch, size, base, turns, C: tl.constexpr):
    """Queries as of `attend_blocks`, turned back by the position of a block's first token."""
    pair = tl.arange(0, C.lanes)
    channel_a, channel_b = pair_channels(C)
    query_a = read_query(query, place, rows, channel_a, scaling, stretch, C) / size
    query_b = read_query(query, place, rows, channel_b, scaling, stretch, C) / size
    cos, sin = cos_sin(base, tl.load(turns + pair, mask=pair < C.pairs, other=0.0))
    return query_a * cos[:, None] + query_b * sin[:, None], query_b * cos[:, None] - query_a * sin[:, None]


@triton.jit
def exact_at(entry, head, token, channel, F: tl.constexpr):
    """Exact numbers of a block [64, head_dim], for `token` and `channel` that broadcast; 0 beyond the last channel."""
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
    entry, tile, levels_a, levels_b, table, scale, zero, head, token_of, K: tl.constexpr, C: tl.constexpr, NUMBER: tl.constexpr
):
    """Keys of a block, but for outliers, not turned: the first and the second channels of pairs, [lanes, 64] each."""
    channel_a, channel_b = pair_channels(C)
    if K.bits == 16:
        keys_a = exact_at(entry, head, token_of[None, :], channel_a[:, None], K)
        keys_b = exact_at(entry, head, token_of[None, :], channel_b[:, None], K)
        return fitting(keys_a, NUMBER), fitting(keys_b, NUMBER)
    else:
        codes_a, codes_b = read(entry, head, channel_a, K, NUMBER), read(entry, head, channel_b, K, NUMBER)
        keys_a = to_numbers(codes_a, levels_a, entry, table, scale, zero, head, channel_a, K, NUMBER)
        keys_b = to_numbers(codes_b, levels_b, entry, table, scale, zero, head, channel_b, K, NUMBER)
        if K.nonzeros > 0:
            keys_a = with_outliers(keys_a, tile, channel_a, channel_a < K.dim, K)
            keys_b = with_outliers(keys_b, tile, channel_b, channel_b < K.dim, K)
        return keys_a, keys_b


@triton.jit
def read_values(entry, tile, levels, table, scale, zero, head, token_of, V: tl.constexpr, NUMBER: tl.constexpr):
    """Values of a block, but for outliers: [channels, 64]."""
    if V.bits == 16:
        return fitting(exact_at(entry, head, token_of[None, :], column_places(V)[:, None], V), NUMBER)
    else:
        codes = read(entry, head, token_of, V, NUMBER)
        numbers = to_numbers(codes, levels, entry, table, scale, zero, head, token_of, V, NUMBER)
        if V.nonzeros > 0:
            numbers = with_outliers(numbers, tile, token_of, token_of < 64, V)
        return tl.trans(numbers)


@triton.jit
def read(entry, head, rows, F: tl.constexpr, NUMBER: tl.constexpr):
    """Codes of rows, as `to_numbers` looks them up."""
    if F.by_bytes and NUMBER == tl.float16:  # noqa: SIM300
        return read_nibbles(entry, head, rows, F)
    else:
        return read_codes(entry, head, rows, F)


@triton.jit
def to_numbers(codes, levels, entry, table, scale, zero, head, rows, F: tl.constexpr, NUMBER: tl.constexpr):
    """What codes stand for, but for outliers: [n, columns]."""
    if F.by_bytes and NUMBER == tl.float16:  # noqa: SIM300
        return ranged(look_up_bytes(codes, levels, F), entry, scale, zero, head, rows, F)
    else:
        return ranged(look_up(codes, table, head, rows, F).to(NUMBER), entry, scale, zero, head, rows, F)
