"""Triton: what is not in sealed blocks: attention over tokens that lie as numbers; and all softmaxes made one."""

import triton
import triton.language as tl

from narrowkv.attention.triton_rows import angles, in_twos, pair_channels, read_query, seen, weigh, write_part

TOKENS = tl.constexpr(64)  # at a time


@triton.jit(do_not_specialize=["slots", "slot", "places", "kept_stride", "padding_stride", "hidden_stride"])  # as in blocks
def attend_loose(
    packed_query, query, tail_keys, tail_values, sink_keys, sink_values, window_keys, window_values, new_keys, new_values,
    lengths, sums, peaks, turns, kept, padding, hidden, sink_index,
    heads, slots, slot, places, kept_stride, padding_stride, hidden_batch, hidden_stride, window,
    tail_stride, sink_stride, window_key_stride, window_value_stride, new_key_stride, new_value_stride,
    scaling, softcap, stretch,
    L: tl.constexpr, TAIL: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """One kind of loose tokens of a head: each has programs of its own, and a slot from `slot` on. Parameters as of
    `attend_part`; TAIL, OLD, NEW: the case for the tail, for sinks and window, and for new tokens.
    """
    kind = tl.program_id(2)
    if L.tail >= 0:  # noqa: SIM102, known to the compiler
        if kind == L.tail:
            attend_part(
                packed_query, tail_keys, tail_values, lengths, sums, peaks, turns, kept, padding, hidden, sink_index,
                heads, slots, slot + L.tail, 4, 8, tail_stride, tail_stride, places,
                kept_stride, padding_stride, hidden_batch, hidden_stride, window,
                scaling, softcap, stretch, False, TAIL, NUMBER,
            )  # fmt: skip
    if L.sinks >= 0:  # noqa: SIM102, known to the compiler
        if kind == L.sinks:
            attend_part(
                query, sink_keys, sink_values, lengths, sums, peaks, turns, kept, padding, hidden, sink_index,
                heads, slots, slot + L.sinks, 5, 5, sink_stride, sink_stride, places,
                kept_stride, padding_stride, hidden_batch, hidden_stride, window,
                scaling, softcap, stretch, True, OLD, NUMBER,
            )  # fmt: skip
    if L.window >= 0:  # noqa: SIM102, known to the compiler
        if kind == L.window:
            attend_part(
                query, window_keys, window_values, lengths, sums, peaks, turns, kept, padding, hidden, sink_index,
                heads, slots, slot + L.window, 6, 9, window_key_stride, window_value_stride, places,
                kept_stride, padding_stride, hidden_batch, hidden_stride, window,
                scaling, softcap, stretch, False, OLD, NUMBER,
            )  # fmt: skip
    if L.new >= 0:  # noqa: SIM102, known to the compiler
        if kind == L.new:
            attend_part(
                query, new_keys, new_values, lengths, sums, peaks, turns, kept, padding, hidden, sink_index,
                heads, slots, slot + L.new, 7, 10, new_key_stride, new_value_stride, places,
                kept_stride, padding_stride, hidden_batch, hidden_stride, window,
                scaling, softcap, stretch, False, NEW, NUMBER,
            )  # fmt: skip


@triton.jit
def attend_part(
    query, keys, values, lengths, sums, peaks, turns, kept, padding, hidden, sink_index,
    heads, slots, slot, held, own, key_stride, value_stride, places,
    kept_stride, padding_stride, hidden_batch, hidden_stride, window,
    scaling, softcap, stretch,
    PLACED: tl.constexpr, C: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Attention over lengths[held] tokens [batch, heads, .., head_dim], the first of which is the lengths[own]-th of all held.

    PLACED: which token of the sequence each is, is told by sink_index [batch, places] instead, and those count that blocks and
    the tail hold too. key_stride, value_stride: from one head to the next. lengths: as `triton_launch` has them. Slot `slot`
    is filled.
    """
    place = tl.program_id(0)
    row = place // heads
    rows = tl.program_id(1) * C.room + tl.arange(0, C.room)
    count, begin = tl.load(lengths + held), tl.load(lengths + own)
    first, asking = tl.load(lengths + 2), tl.load(lengths + 3)
    packed = tl.load(lengths + 1) + tl.load(lengths + 4)
    kept += row.to(tl.int64) * kept_stride + tl.load(lengths + 11) * C.kept_width
    padding += row.to(tl.int64) * padding_stride
    hidden += (row % hidden_batch).to(tl.int64) * C.queries * hidden_stride
    keys += place.to(tl.int64) * key_stride
    values += place.to(tl.int64) * value_stride

    channel_a, channel_b = pair_channels(C)
    query_a = read_query(query, place, rows, channel_a, scaling, stretch, C).to(NUMBER)
    query_b = read_query(query, place, rows, channel_b, scaling, stretch, C).to(NUMBER)
    pair, channel = tl.arange(0, C.lanes), tl.arange(0, C.wide)
    largest = tl.full([C.room], float("-inf"), tl.float32)
    total = tl.full([C.room], 0, tl.float32)
    part = tl.full([C.wide, C.room], 0, tl.float32)
    for start in range(0, count, TOKENS):
        token = start + tl.arange(0, TOKENS)
        live = token < count
        standing = begin + token
        if PLACED:
            standing = (tl.load(sink_index + row * places + token, mask=live, other=-1) - first).to(tl.int32)
            live &= (standing >= 0) & (standing < packed)
        for j in tl.static_range(tl.constexpr(C.sinks)):
            live &= first + standing != tl.load(sink_index + row * C.sinks + j)
        at = token[:, None] * C.dim
        inside = (pair < C.half)[None, :] & live[:, None]
        keys_a = tl.load(keys + at + channel_a[None, :], mask=inside, other=0.0).to(tl.float32)
        keys_b = tl.load(keys + at + channel_b[None, :], mask=inside, other=0.0).to(tl.float32)
        if C.turning != "none":
            cos, sin = angles(pair[None, :], standing[:, None], live[:, None], turns, turns, kept, C)
            keys_a, keys_b = keys_a * cos - keys_b * sin, keys_b * cos + keys_a * sin
        scores = tl.dot(keys_a.to(NUMBER), query_a, input_precision=C.precision)
        scores = tl.dot(keys_b.to(NUMBER), query_b, scores, input_precision=C.precision)
        sees = seen(rows, standing, live, first, asking, padding, hidden, hidden_stride, window, C)
        scores = tl.where(sees, in_twos(scores, softcap, C), float("-inf"))
        weights, fading, largest = weigh(scores, largest)
        total = total * fading + tl.sum(weights, 0)
        inside = live[None, :] & (channel < C.dim)[:, None]
        some = tl.load(values + token[None, :] * C.dim + channel[:, None], mask=inside, other=0.0)
        part = tl.dot(some.to(NUMBER), weights.to(NUMBER), part * fading[None, :], input_precision=C.precision)
    write_part(sums, peaks, part, total, largest, channel, rows, place * slots + slot, C)


@triton.jit(do_not_specialize=["total_rows", "slots", "packed"])
def merge(
    sums, peaks, sink_logits, output, total_rows, slots, packed, group_rows, queries, dim,
    SLOTS: tl.constexpr, WIDE: tl.constexpr, SINKS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One row of the result, [rows of all, head_dim], from the parts of all slots, [heads of all, slots, rows of a group, ..].

    APART: the sum of the first `packed` slots goes to output[0], that of the others to output[1].
    """
    row = tl.program_id(0)
    head, within = row // group_rows, row % group_rows
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, WIDE)
    at = (head * slots + slot) * group_rows + within
    largest = tl.load(peaks + 2 * at, mask=slot < slots, other=float("-inf"))
    total = tl.load(peaks + 2 * at + 1, mask=slot < slots, other=0.0)
    peak = tl.max(largest, 0)
    if SINKS:
        sink = tl.load(sink_logits + row // queries % SINKS).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    reference = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(largest - reference)
    whole = tl.sum(weights * total, 0)
    if SINKS:
        whole += tl.exp2(sink - reference)
    weights = weights / tl.where(whole == 0.0, 1.0, whole)
    inside = (slot < slots)[:, None] & (channel < dim)[None, :]
    parts = tl.load(sums + at[:, None] * dim + channel[None, :], mask=inside, other=0.0) * weights[:, None]
    if APART:
        own = tl.sum(tl.where((slot < packed)[:, None], parts, 0.0), 0)
        tl.store(output + row * dim + channel, own, mask=channel < dim)
        parts = tl.where((slot < packed)[:, None], 0.0, parts)
        output += total_rows * dim
    tl.store(output + row * dim + channel, tl.sum(parts, 0), mask=channel < dim)
