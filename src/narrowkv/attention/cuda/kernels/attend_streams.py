"""Triton: attention over sealed blocks of trellis-coded streams, a run of blocks of one KV head of one sequence a program.

    queries of coefficients: two channels each, at an angle of 0 (still) and a quarter of a cycle further (quarter)
    for each block:
        rotate queries on to its first frame, and from there to each of its four frames of 16 tokens
        steps of keys, in registers; outliers instead of their codes, from a tile
        scores = steps of each frame x queries of that frame + what the mean of keys adds there
        weights of the running softmax, times the norms of tokens
        sums = sums x rescale factor + steps of values x weights
    write sums, running maximum and denominator

Nothing is rotated for each token. Where positions do not follow each other, steps are multiplied by cosines and sines instead.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.common import cos_sin, in_powers_of_2, seen, weigh, write_part
from narrowkv.attention.cuda.kernels.prefetch import addresses_of, fetch, outlier_range
from narrowkv.attention.cuda.kernels.stream_outliers import (
    clear_stream_outliers,
    put_stream_outliers,
    with_stream_outliers,
)
from narrowkv.attention.cuda.kernels.streams import by_frames, code_rows, joined, norms_of, read_steps

ROTATED_BLOCKS = tl.constexpr(16)  # blocks for which queries are rotated on from one to the next, before they are rotated anew


class QueryTables(NamedTuple):
    """What `stream_tables.StreamTables` has of queries: pointers."""

    p_channels: object
    p_weights: object
    p_offsets: object
    p_cycles: object


def queries_of(side: Any) -> QueryTables:
    """Of `stream_tables.StreamTables`, or of what has the same names."""
    return QueryTables(side.channels, side.weights, side.offsets, side.cycles)


class Masks(NamedTuple):
    """What tells which tokens a query sees: pointers, as `angles` and `seen` read them, and indices of attention sinks."""

    p_rope_state: object
    p_padding: object
    p_hidden: object
    p_sink_index: object


class Results(NamedTuple):
    """Pointers that `write_part` takes."""

    p_sums: object
    p_running_max: object


# integers that change while a cache grows: a kernel would be compiled anew for multiples of 16, and for 1
@triton.jit(do_not_specialize=["slots", "rope_state_stride", "padding_stride", "hidden_stride"])
def attend_streams(
    p_query, blocks, p_lengths, results, p_tiles, keys, queries, values, masks,
    slots, rope_state_stride, padding_stride, hidden_batch, hidden_stride, scaling, softcap,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """p_query: [batch, heads, rows, head_dim]. blocks: `streams.Blocks`. p_lengths: as `launch` has them. p_tiles: of each
    program, for outliers. keys, values: `streams.StreamCodes`. Results like those of `write_part`, of coefficients of values
    in grid steps, [batch * heads, slots, ..], of which a program fills the slot of its split.
    """
    split, batch_head = tl.program_id(0), tl.program_id(1)
    row, head = batch_head // K.heads, batch_head % K.heads
    rows = tl.program_id(2) * C.capacity + tl.arange(0, C.capacity)
    count, sealed = tl.load(p_lengths), tl.load(p_lengths + 1)
    first, query_positions = tl.load(p_lengths + 2), tl.load(p_lengths + 3)
    splits, batch = tl.num_programs(0), tl.num_programs(1) // K.heads
    share = (count + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, count)
    p_rope_state = masks.p_rope_state + row.to(tl.int64) * rope_state_stride + tl.load(p_lengths + 11)
    p_padding = masks.p_padding + row.to(tl.int64) * padding_stride
    p_hidden = masks.p_hidden + (row % hidden_batch).to(tl.int64) * C.queries * hidden_stride

    coefficient, token = tl.arange(0, K.capacity), tl.arange(0, 64)
    b_still, b_quarter = read_coefficients(p_query, batch_head, head, rows, coefficient, queries, scaling, K, C)
    size = tl.max(tl.abs(b_still) + tl.abs(b_quarter), 0)  # which none exceeds at any angle: so that 16 bits hold them
    size = tl.where(size > 0, size, 1.0)[None, :]
    b_still, b_quarter = b_still / size, b_quarter / size  # later rotated to the first frame of a block
    if C.rope_mode == "near":
        frame_cos, frame_sin = cos_sin(coefficient * 0 + 16, read_cycles(queries, head, coefficient, K))
        frame_cos, frame_sin = frame_cos[:, None], frame_sin[:, None]
    key_rows, value_rows = code_rows(keys, coefficient, ELEMENT, K), code_rows(values, coefficient, ELEMENT, V)
    offsets = read_offsets(queries, head, coefficient, K).to(ELEMENT)

    program = (tl.program_id(2) * tl.num_programs(1) + batch_head) * splits + split
    p_key_tile = p_tiles + program.to(tl.int64) * (K.tile + V.tile)
    p_value_tile = p_key_tile + K.tile
    for i in range(0, K.tile + V.tile, 1024):
        within = i + tl.arange(0, 1024)
        tl.store(p_key_tile + within, tl.full([1024], 0, ELEMENT), mask=within < K.tile + V.tile)
    running_max = tl.full([C.capacity], float("-inf"), tl.float32)
    denominators = tl.full([64, C.capacity], 0, tl.float32)
    sums = tl.full([V.capacity, C.capacity], 0, tl.float32)
    reached = -(2**31)  # where queries are rotated to, if a block begins there
    for i in range(begin, end):
        entry = blocks.p_table + (i * batch + row) * 16
        start = tl.load(blocks.p_starts + i)
        live = token < tl.minimum(tl.load(blocks.p_starts + i + 1), sealed) - start
        if C.rope_mode == "near":
            base = tl.load(blocks.p_bases + i * batch + row)
            if base != reached or (i - begin) % ROTATED_BLOCKS == 0:
                cos, sin = cos_sin(base + 16, read_cycles(queries, head, coefficient, K))
                still, quarter = read_coefficients(p_query, batch_head, head, rows, coefficient, queries, scaling, K, C)
                b_still, b_quarter = rotated(still / size, quarter / size, cos[:, None], sin[:, None])
            reached = base + 64
        if K.nonzeros + V.nonzeros > 0:  # such a loop the compiler does not read ahead in
            following = blocks.p_table + (tl.minimum(i + 1, end - 1) * batch + row) * 16
            next_keys, next_values = addresses_of(following), addresses_of(following + 8)
            tl.debug_barrier()  # until tiles are cleared
        if K.nonzeros > 0:
            key_begin, key_end, key_first = put_stream_outliers(p_key_tile, entry, head, keys, K)
        if V.nonzeros > 0:
            value_begin, value_end, value_first = put_stream_outliers(p_value_tile, entry + 8, head, values, V)
        if K.nonzeros + V.nonzeros > 0:
            tl.debug_barrier()  # until outliers are written
        even, odd = read_steps(entry, head, coefficient, key_rows, keys, ELEMENT, K)
        if K.nonzeros > 0:
            even, odd = with_stream_outliers(even, odd, p_key_tile, coefficient, K)
        steps = joined(even, odd, ELEMENT)
        if C.rope_mode == "positions":
            cycles = read_cycles(queries, head, coefficient, K)
            cos, sin = cos_sin_of_tokens(p_rope_state + start, token, live, cycles)
            scores = scores_of_tokens(steps, offsets, cos, sin, b_still, b_quarter, C, ELEMENT)
        elif C.rope_mode == "near":
            frame_0 = b_still.to(ELEMENT)
            b_still, b_quarter = rotated(b_still, b_quarter, frame_cos, frame_sin)
            frame_1 = b_still.to(ELEMENT)
            b_still, b_quarter = rotated(b_still, b_quarter, frame_cos, frame_sin)
            frame_2 = b_still.to(ELEMENT)
            b_still, b_quarter = rotated(b_still, b_quarter, frame_cos, frame_sin)
            scores = scores_of_frames(steps, offsets, frame_0, frame_1, frame_2, b_still.to(ELEMENT), C)
            b_still, b_quarter = rotated(b_still, b_quarter, frame_cos, frame_sin)  # to the next block
        else:
            frame = b_still.to(ELEMENT)
            scores = scores_of_frames(steps, offsets, frame, frame, frame, frame, C)
        scores = in_powers_of_2(scores * size, softcap, C)
        key_from, key_to, value_from, value_to = 0, 0, 0, 0
        if K.nonzeros > 0:
            key_from, key_to = outlier_range(next_keys[3], head)
        if V.nonzeros > 0:
            value_from, value_to = outlier_range(next_values[3], head)
        norms, largest_norm = norms_of(entry + 8, head, token, live, V)
        for j in tl.static_range(tl.constexpr(C.sinks)):
            live &= first + start + token != tl.load(masks.p_sink_index + row * C.sinks + j)
        sees = seen(rows, start + token, live, first, query_positions, p_padding, p_hidden, hidden_stride, C.window, C)
        weights, rescale, running_max = weigh(tl.where(sees, scores, float("-inf")), running_max)
        denominators = denominators * rescale[None, :] + weights
        even, odd = read_steps(entry + 8, head, coefficient, value_rows, values, ELEMENT, V)
        if V.nonzeros > 0:
            even, odd = with_stream_outliers(even, odd, p_value_tile, coefficient, V)
        found = tl.dot(joined(even, odd, ELEMENT), (weights * norms[:, None]).to(ELEMENT), input_precision=C.precision)
        sums = sums * rescale[None, :] + found * largest_norm
        if K.nonzeros + V.nonzeros > 0:
            fetch(next_keys, key_from, key_to, head, K)
            fetch(next_values, value_from, value_to, head, V)
            tl.debug_barrier()  # until tiles are read
        if K.nonzeros > 0:
            clear_stream_outliers(p_key_tile, entry, key_begin, key_end, key_first, K)
        if V.nonzeros > 0:
            clear_stream_outliers(p_value_tile, entry + 8, value_begin, value_end, value_first, V)
    slot = batch_head * slots + split
    write_part(results.p_sums, results.p_running_max, sums, tl.sum(denominators, 0), running_max, coefficient, rows, slot, C)


@triton.jit
def read_coefficients(p_query, batch_head, head, rows, coefficient, queries, scaling, K: tl.constexpr, C: tl.constexpr):
    """Queries as coefficients see them, at an angle of 0 and a quarter of a cycle further: [capacity, rows] float32."""
    inside = coefficient < K.dim
    at = head * K.dim + coefficient
    live = (rows < C.rows)[None, :] & inside[:, None]
    p_row = p_query + (batch_head * C.rows + rows)[None, :] * C.dim
    channel_a = tl.load(queries.p_channels + 2 * at, mask=inside, other=0)
    channel_b = tl.load(queries.p_channels + 2 * at + 1, mask=inside, other=0)
    query_a = tl.load(p_row + channel_a[:, None], mask=live, other=0.0).to(tl.float32) * scaling
    query_b = tl.load(p_row + channel_b[:, None], mask=live, other=0.0).to(tl.float32) * scaling
    p_weight = queries.p_weights + 4 * at
    first, second = tl.load(p_weight, mask=inside, other=0.0), tl.load(p_weight + 1, mask=inside, other=0.0)
    still = query_a * first[:, None] + query_b * second[:, None]
    first, second = tl.load(p_weight + 2, mask=inside, other=0.0), tl.load(p_weight + 3, mask=inside, other=0.0)
    return still, query_a * first[:, None] + query_b * second[:, None]


@triton.jit
def read_cycles(queries, head, coefficient, K: tl.constexpr):
    """How many cycles coefficients rotate by from a position to the next: float64."""
    return tl.load(queries.p_cycles + head * K.dim + coefficient, mask=coefficient < K.dim, other=0.0)


@triton.jit
def read_offsets(queries, head, coefficient, K: tl.constexpr):
    """What the mean of keys adds at the tokens of a frame: [16, capacity] float32."""
    at = queries.p_offsets + (head * 16 + tl.arange(0, 16))[:, None] * K.dim + coefficient[None, :]
    return tl.load(at, mask=(coefficient < K.dim)[None, :], other=0.0)


@triton.jit
def rotated(still, quarter, cos, sin):
    """Queries at an angle and a quarter of a cycle further, both rotated on."""
    return still * cos + quarter * sin, quarter * cos - still * sin


@triton.jit
def scores_of_frames(steps, offsets, frame_0, frame_1, frame_2, frame_3, C: tl.constexpr):
    """Scores [64, rows] of steps [n, 64], by the queries of each frame [n, rows]; offsets: [16, n].

    All tokens meet the queries of all frames, of which each is to meet one: a product this small takes no time.
    """
    n: tl.constexpr = steps.shape[0]
    rows: tl.constexpr = frame_0.shape[1]
    every = tl.join(tl.join(frame_0, frame_1), tl.join(frame_2, frame_3))
    every = tl.reshape(tl.permute(every, (0, 3, 2, 1)), [n, 4 * rows])
    added = tl.dot(offsets, every, input_precision=C.precision)
    added = tl.reshape(tl.broadcast_to(added[None, :, :], [4, 16, 4 * rows]), [64, 4 * rows])
    scores = tl.reshape(tl.dot(tl.trans(steps), every, added, input_precision=C.precision), [64, 4, rows])
    own = (tl.arange(0, 64) // 16)[:, None, None] == tl.arange(0, 4)[None, :, None]
    return tl.sum(tl.where(own, scores, 0.0), 1)


@triton.jit
def scores_of_tokens(steps, offsets, cos, sin, still, quarter, C: tl.constexpr, ELEMENT: tl.constexpr):
    """Scores [64, rows], where each token [64] has an angle of its own: cos, sin [64, n]; queries still, quarter [n, rows]."""
    every = tl.reshape(by_frames(steps).to(tl.float32) + offsets.to(tl.float32)[None, :, :], [64, offsets.shape[1]])
    scores = tl.dot((every * cos).to(ELEMENT), still.to(ELEMENT), input_precision=C.precision)
    return tl.dot((every * sin).to(ELEMENT), quarter.to(ELEMENT), scores, input_precision=C.precision)


@triton.jit
def cos_sin_of_tokens(p_positions, token, live, cycles):
    """Cosines and sines [64, n] of the positions to which tokens of a block have queries rotated, each by its own position."""
    position = tl.load(p_positions + token, mask=live, other=0)
    return cos_sin((position + 16 - token % 16)[:, None], cycles[None, :])
