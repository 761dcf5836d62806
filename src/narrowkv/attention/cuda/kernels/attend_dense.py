"""Triton: what is not in sealed blocks: attention over tokens that lie as elements; and all softmaxes made one."""

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.common import angles, in_powers_of_2, pair_channels, read_query, seen, weigh, write_part

TOKENS = tl.constexpr(64)  # at a time


@triton.jit(
    do_not_specialize=["slots", "slot", "sinks", "rope_state_stride", "padding_stride", "hidden_stride"]
)  # as in blocks
def attend_dense(
    packed_query, query, tail_keys, tail_values, sink_keys, sink_values, window_keys, window_values, new_keys, new_values,
    lengths, sums, running_max, cycles, rope_state, padding, hidden, sink_index,
    heads, slots, slot, sinks, rope_state_stride, padding_stride, hidden_batch, hidden_stride, window,
    tail_stride, sink_stride, window_key_stride, window_value_stride, new_key_stride, new_value_stride,
    scaling, softcap, rope_scale,
    L: tl.constexpr, TAIL: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """One kind of dense segments of a head: each has programs of its own, and a slot from `slot` on. Parameters like those of
    `attend_part`; TAIL, OLD, NEW: the case for the tail, for sinks and window, and for new tokens.
    """
    kind = tl.program_id(2)
    if L.tail >= 0:  # noqa: SIM102, known to the compiler
        if kind == L.tail:
            attend_part(
                packed_query, tail_keys, tail_values, lengths, sums, running_max, cycles, rope_state, padding, hidden,
                sink_index,
                heads, slots, slot + L.tail, 4, 8, tail_stride, tail_stride, sinks,
                rope_state_stride, padding_stride, hidden_batch, hidden_stride, window,
                scaling, softcap, rope_scale, False, TAIL, ELEMENT,
            )  # fmt: skip
    if L.sinks >= 0:  # noqa: SIM102, known to the compiler
        if kind == L.sinks:
            attend_part(
                query, sink_keys, sink_values, lengths, sums, running_max, cycles, rope_state, padding, hidden, sink_index,
                heads, slots, slot + L.sinks, 5, 5, sink_stride, sink_stride, sinks,
                rope_state_stride, padding_stride, hidden_batch, hidden_stride, window,
                scaling, softcap, rope_scale, True, OLD, ELEMENT,
            )  # fmt: skip
    if L.window >= 0:  # noqa: SIM102, known to the compiler
        if kind == L.window:
            attend_part(
                query, window_keys, window_values, lengths, sums, running_max, cycles, rope_state, padding, hidden, sink_index,
                heads, slots, slot + L.window, 6, 9, window_key_stride, window_value_stride, sinks,
                rope_state_stride, padding_stride, hidden_batch, hidden_stride, window,
                scaling, softcap, rope_scale, False, OLD, ELEMENT,
            )  # fmt: skip
    if L.new >= 0:  # noqa: SIM102, known to the compiler
        if kind == L.new:
            attend_part(
                query, new_keys, new_values, lengths, sums, running_max, cycles, rope_state, padding, hidden, sink_index,
                heads, slots, slot + L.new, 7, 10, new_key_stride, new_value_stride, sinks,
                rope_state_stride, padding_stride, hidden_batch, hidden_stride, window,
                scaling, softcap, rope_scale, False, NEW, ELEMENT,
            )  # fmt: skip


@triton.jit
def attend_part(
    query, keys, values, lengths, sums, running_max, cycles, rope_state, padding, hidden, sink_index,
    heads, slots, slot, stored, own, key_stride, value_stride, sinks,
    rope_state_stride, padding_stride, hidden_batch, hidden_stride, window,
    scaling, softcap, rope_scale,
    BY_INDEX: tl.constexpr, C: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Attention over lengths[stored] tokens [batch, heads, .., head_dim], the first of which is the lengths[own]-th stored.

    BY_INDEX: which token of the sequence each is, is given by sink_index [batch, sinks] instead, and those count that blocks
    and the tail have too. key_stride, value_stride: from one head to the next. lengths: as `launch` has them. Slot `slot`
    is filled.
    """
    batch_head = tl.program_id(0)
    row = batch_head // heads
    rows = tl.program_id(1) * C.capacity + tl.arange(0, C.capacity)
    count, begin = tl.load(lengths + stored), tl.load(lengths + own)
    first, query_positions = tl.load(lengths + 2), tl.load(lengths + 3)
    packed = tl.load(lengths + 1) + tl.load(lengths + 4)
    rope_state += row.to(tl.int64) * rope_state_stride + tl.load(lengths + 11) * C.rope_state_width
    padding += row.to(tl.int64) * padding_stride
    hidden += (row % hidden_batch).to(tl.int64) * C.queries * hidden_stride
    keys += batch_head.to(tl.int64) * key_stride
    values += batch_head.to(tl.int64) * value_stride

    channel_a, channel_b = pair_channels(C)
    query_a = read_query(query, batch_head, rows, channel_a, scaling, rope_scale, C).to(ELEMENT)
    query_b = read_query(query, batch_head, rows, channel_b, scaling, rope_scale, C).to(ELEMENT)
    pair, channel = tl.arange(0, C.lanes), tl.arange(0, C.wide)
    largest = tl.full([C.capacity], float("-inf"), tl.float32)
    total = tl.full([C.capacity], 0, tl.float32)
    part = tl.full([C.wide, C.capacity], 0, tl.float32)
    for start in range(0, count, TOKENS):
        token = start + tl.arange(0, TOKENS)
        live = token < count
        standing = begin + token
        if BY_INDEX:
            standing = (tl.load(sink_index + row * sinks + token, mask=live, other=-1) - first).to(tl.int32)
            live &= (standing >= 0) & (standing < packed)
        for j in tl.static_range(tl.constexpr(C.sinks)):
            live &= first + standing != tl.load(sink_index + row * C.sinks + j)
        at = token[:, None] * C.dim
        inside = (pair < C.half)[None, :] & live[:, None]
        keys_a = tl.load(keys + at + channel_a[None, :], mask=inside, other=0.0).to(tl.float32)
        keys_b = tl.load(keys + at + channel_b[None, :], mask=inside, other=0.0).to(tl.float32)
        if C.rope_mode != "none":
            cos, sin = angles(pair[None, :], standing[:, None], live[:, None], cycles, cycles, rope_state, C)
            keys_a, keys_b = keys_a * cos - keys_b * sin, keys_b * cos + keys_a * sin
        scores = tl.dot(keys_a.to(ELEMENT), query_a, input_precision=C.precision)
        scores = tl.dot(keys_b.to(ELEMENT), query_b, scores, input_precision=C.precision)
        sees = seen(rows, standing, live, first, query_positions, padding, hidden, hidden_stride, window, C)
        scores = tl.where(sees, in_powers_of_2(scores, softcap, C), float("-inf"))
        weights, rescale, largest = weigh(scores, largest)
        total = total * rescale + tl.sum(weights, 0)
        inside = live[None, :] & (channel < C.dim)[:, None]
        some = tl.load(values + token[None, :] * C.dim + channel[:, None], mask=inside, other=0.0)
        part = tl.dot(some.to(ELEMENT), weights.to(ELEMENT), part * rescale[None, :], input_precision=C.precision)
    write_part(sums, running_max, part, total, largest, channel, rows, batch_head * slots + slot, C)


@triton.jit(do_not_specialize=["total_rows", "slots", "packed"])
def merge(
    sums, running_max, sink_logits, output, total_rows, slots, packed, group_rows, queries, dim, width,
    SLOTS: tl.constexpr, WIDE: tl.constexpr, SINKS: tl.constexpr, APART: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """One row of the result, [rows of all, width], from the parts of all slots, [heads of all, slots, rows of a group, ..].

    APART: the sum of the first `packed` slots goes to output[0], that of the others to output[1]. SHARE: behind the former
    goes what part of all weights it has.
    """
    row = tl.program_id(0)
    head, within = row // group_rows, row % group_rows
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, WIDE)
    at = (head * slots + slot) * group_rows + within
    largest = tl.load(running_max + 2 * at, mask=slot < slots, other=float("-inf"))
    total = tl.load(running_max + 2 * at + 1, mask=slot < slots, other=0.0)
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
        tl.store(output + row * width + channel, own, mask=channel < dim)
        if SHARE:
            tl.store(output + row * width + dim, tl.sum(tl.where(slot < packed, weights * total, 0.0), 0))
        parts = tl.where((slot < packed)[:, None], 0.0, parts)
        output += total_rows * width
    tl.store(output + row * width + channel, tl.sum(parts, 0), mask=channel < dim)
