"""Triton: trellis-coded streams as elements: sealed blocks, for the attention of prompts, and the open tail.

steps of a block, or of some tokens of the tail, outliers instead of their codes
keys: add what the mean of keys adds; two coefficients become two channels, rotated from the middle of their frame
values: times the norms of tokens; they stay coefficients in grid steps
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowkv.attention.cuda.block_table import BlockTable
from narrowkv.attention.cuda.kernels.common import cos_sin
from narrowkv.attention.cuda.kernels.layout import KernelConfig
from narrowkv.attention.cuda.kernels.stream_outliers import put_stream_outliers, with_stream_outliers
from narrowkv.attention.cuda.kernels.streams import (
    Blocks,
    by_frames,
    code_rows,
    codes_of,
    joined,
    norm_of,
    norms_of,
    read_steps,
    step_by_step,
)
from narrowkv.attention.cuda.stream_tables import Streams

WARPS = 4
TOKENS = tl.constexpr(32)  # of the tail, for a program
OUTLIERS = tl.constexpr(128)  # of the tail at a time


class PairTables(NamedTuple):
    """What `stream_tables.StreamTables` has of pairs of channels: pointers."""

    p_pairs: object
    p_pair_weights: object
    p_offsets: object
    p_cycles: object


def pairs_of(side: Any) -> PairTables:
    """Of `stream_tables.StreamTables`, or of what has the same names."""
    return PairTables(side.pairs, side.pair_weights, side.offsets, side.cycles)


class TailOutliers(NamedTuple):
    """Pointers to outliers of the tail: index [..] int64 in [batch, heads, 64, n], values, of which count[0] count."""

    p_index: object
    p_values: object
    p_count: object


SPAN = ["column", "begin", "stop", "capacity", "rope_state_stride"]  # prompts of any length are one program


@triton.jit(do_not_specialize=SPAN)
def dequantize_stream_keys(
    p_keys, blocks, p_rope_state, p_tiles, keys, pairs, column, begin, stop, capacity, rope_state_stride, rope_scale,
    K: tl.constexpr, C: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Keys of columns from `column` on, of the tokens from `begin` to before `stop` of those stored.

    p_keys: [batch, heads, capacity, head_dim]. p_rope_state: positions. rope_scale: the factor of the rotary embedding.
    p_tiles: of each program, for outliers; other parameters like those of `attend_streams`.
    """
    i, batch_head = column + tl.program_id(0), tl.program_id(1)
    row, head, batch = batch_head // K.heads, batch_head % K.heads, tl.num_programs(1) // K.heads
    entry = blocks.p_table + (i * batch + row) * 16
    start = tl.load(blocks.p_starts + i)
    count = tl.minimum(tl.load(blocks.p_starts + i + 1), stop) - start
    p_tile = own_tile(p_tiles, entry, head, keys, ELEMENT, K)
    slot_a, slot_b, channel_a, channel_b = read_pairs(pairs, head, K, C)
    elements_a = by_frames(steps_with_outliers(entry, head, slot_a, p_tile, keys, ELEMENT, K)).to(tl.float32)
    elements_b = by_frames(steps_with_outliers(entry, head, slot_b, p_tile, keys, ELEMENT, K)).to(tl.float32)
    token = tl.reshape(tl.arange(0, 64), [4, 16, 1])
    in_frame = (head * 16 + token % 16) * K.dim
    elements_a, elements_b = to_channels(elements_a, elements_b, in_frame, slot_a, slot_b, head, pairs, K, C)
    if C.rope_mode != "none":
        cycles = tl.load(pairs.p_cycles + head * K.dim + slot_a, mask=slot_a < K.dim, other=0.0)[None, None, :]
        if C.rope_mode == "near":
            position = tl.load(blocks.p_bases + i * batch + row) + 16 * tl.arange(0, 4)[:, None, None] + 8
        else:
            at = p_rope_state + row.to(tl.int64) * rope_state_stride + start + token
            position = tl.load(at, mask=token < count, other=0) + 8 - token % 16
        cos, sin = cos_sin(position, cycles)
        factor = tl.where(tl.arange(0, C.lanes) < C.pairs, rope_scale, 1.0)[None, None, :]
        cos, sin = cos * factor, sin * factor
        elements_a, elements_b = elements_a * cos - elements_b * sin, elements_b * cos + elements_a * sin
    token = tl.arange(0, 64)
    inside = (token < count)[:, None] & (slot_a < K.dim)[None, :]
    p_keys += (batch_head.to(tl.int64) * capacity + (start - begin)) * K.dim
    at = p_keys + token[:, None] * K.dim
    tl.store(at + channel_a[None, :], tl.reshape(elements_a, [64, C.lanes]), mask=inside)
    tl.store(at + channel_b[None, :], tl.reshape(elements_b, [64, C.lanes]), mask=inside)


@triton.jit(do_not_specialize=SPAN[:-1])
def dequantize_stream_values(
    p_values, blocks, p_tiles, values, column, begin, stop, capacity, V: tl.constexpr, ELEMENT: tl.constexpr
):
    """Values of columns as coefficients, p_values: [batch, heads, capacity, head_dim]; those without codes are 0."""
    i, batch_head = column + tl.program_id(0), tl.program_id(1)
    row, head, batch = batch_head // V.heads, batch_head % V.heads, tl.num_programs(1) // V.heads
    entry = blocks.p_table + (i * batch + row) * 16 + 8
    start = tl.load(blocks.p_starts + i)
    coefficient, token = tl.arange(0, V.capacity), tl.arange(0, 64)
    live = token < tl.minimum(tl.load(blocks.p_starts + i + 1), stop) - start
    p_tile = own_tile(p_tiles, entry, head, values, ELEMENT, V)
    steps = by_frames(steps_with_outliers(entry, head, coefficient, p_tile, values, ELEMENT, V)).to(tl.float32)
    norms, largest = norms_of(entry, head, token, live, V)
    elements = tl.reshape(steps, [64, V.capacity]) * (norms * largest)[:, None]
    p_values += (batch_head.to(tl.int64) * capacity + (start - begin)) * V.dim
    inside = live[:, None] & (coefficient < V.dim)[None, :]
    tl.store(p_values + token[:, None] * V.dim + coefficient[None, :], elements, mask=inside)


@triton.jit
def dequantize_stream_tail(
    p_key_codes, p_value_codes, keys, values, pairs, key_outliers, value_outliers, p_keys, p_values,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Some tokens of a head of the tail: keys as channels, not rotated, or values as coefficients in grid steps.

    p_key_codes, p_value_codes: [batch, heads, 64, bytes] uint8. p_keys, p_values: [batch, heads, 64, head_dim] float32.
    """
    batch_head, first = tl.program_id(0), tl.program_id(1) * TOKENS
    if tl.program_id(2) == 0:
        dequantize_coefficients(p_key_codes, keys, key_outliers, p_keys, batch_head, first, K)
        slot_a, slot_b, channel_a, channel_b = read_pairs(pairs, batch_head % K.heads, K, C)
        token = first + tl.arange(0, TOKENS)
        inside = (slot_a < K.dim)[None, :] & (token >= 0)[:, None]
        at = p_keys + (batch_head * 64 + token)[:, None] * K.dim
        elements_a, elements_b = (
            tl.load(at + slot_a[None, :], mask=inside, other=0.0),
            tl.load(at + slot_b[None, :], mask=inside, other=0.0),
        )
        in_frame = (batch_head % K.heads * 16 + token % 16)[:, None] * K.dim
        elements_a, elements_b = to_channels(
            elements_a, elements_b, in_frame, slot_a, slot_b, batch_head % K.heads, pairs, K, C
        )
        cycles = tl.load(pairs.p_cycles + batch_head % K.heads * K.dim + slot_a, mask=slot_a < K.dim, other=0.0)
        cos, sin = cos_sin((8 - token % 16)[:, None], cycles[None, :])
        tl.debug_barrier()  # every thread has read what others are about to write
        tl.store(at + channel_a[None, :], elements_a * cos - elements_b * sin, mask=inside)
        tl.store(at + channel_b[None, :], elements_b * cos + elements_a * sin, mask=inside)
    else:
        dequantize_coefficients(p_value_codes, values, value_outliers, p_values, batch_head, first, V)


@triton.jit
def dequantize_coefficients(p_codes, codes, outliers, p_elements, batch_head, first, F: tl.constexpr):
    """Coefficients of some tokens of the tail, in grid steps, times norms; others write none of these tokens."""
    coefficient, token = tl.arange(0, F.capacity), first + tl.arange(0, TOKENS)
    found = code_rows(codes, coefficient, tl.float32, F)
    stream = p_codes + (batch_head * 64 + token) * F.stream_bytes
    live = (coefficient < F.codes)[:, None] & (token >= 0)[None, :]
    steps = step_by_step(stream[None, :] + found[0], 1, found, codes, live)
    if F.norms:
        steps = steps * norm_of(tl.load(stream + F.stream_bytes - 1).to(tl.float32))[None, :]
    inside = (coefficient < F.dim)[:, None] & (token >= 0)[None, :]
    tl.store(p_elements + (batch_head * 64 + token)[None, :] * F.dim + coefficient[:, None], steps, mask=inside)
    tl.debug_barrier()  # outliers are written after what their codes stand for
    if F.nonzeros > 0:
        begin = (batch_head * 64 + first).to(tl.int64) * F.codes
        count = tl.load(outliers.p_count)
        for some in range(0, count, OUTLIERS):
            which = some + tl.arange(0, OUTLIERS)
            index = tl.load(outliers.p_index + which, mask=which < count, other=-1)
            own = (index >= begin) & (index < begin + TOKENS * F.codes)
            within = tl.where(own, index - begin, 0).to(tl.int32)
            at = batch_head * 64 + first + within // F.codes
            exact = tl.load(outliers.p_values + which, mask=own, other=0.0).to(tl.float32)
            exact *= tl.load(codes.p_finer + within % F.codes, mask=own, other=0.0)
            if F.norms:
                norm = tl.load(p_codes + at * F.stream_bytes + F.stream_bytes - 1, mask=own, other=0)
                exact *= norm_of(norm.to(tl.float32))
            tl.store(p_elements + at * F.dim + within % F.codes, exact, mask=own)
        tl.debug_barrier()  # until outliers are written


@triton.jit
def own_tile(p_tiles, entry, head, codes, ELEMENT: tl.constexpr, F: tl.constexpr):
    """A program's tile of zeros and the outliers of a head of a block."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    p_tile = p_tiles + program.to(tl.int64) * F.tile
    if F.nonzeros > 0:
        for i in range(0, F.tile, 1024):
            within = i + tl.arange(0, 1024)
            tl.store(p_tile + within, tl.full([1024], 0, ELEMENT), mask=within < F.tile)
        tl.debug_barrier()  # until zeros are written
        put_stream_outliers(p_tile, entry, head, codes, F)
        tl.debug_barrier()  # until outliers are written
    return p_tile


@triton.jit
def steps_with_outliers(entry, head, rows, p_tile, codes, ELEMENT: tl.constexpr, F: tl.constexpr):
    """Coefficients [n] of a head of a block, outliers instead of their codes: [n, 64] ELEMENT."""
    even, odd = read_steps(entry, head, rows, code_rows(codes, rows, ELEMENT, F), codes, ELEMENT, F)
    if F.nonzeros > 0:
        even, odd = with_stream_outliers(even, odd, p_tile, rows, F)
    return joined(even, odd, ELEMENT)


@triton.jit
def read_pairs(pairs, head, K: tl.constexpr, C: tl.constexpr):
    """Coefficients of the stream that are a pair, head_dim beyond the last one, and their channels: [lanes] each."""
    pair = tl.arange(0, C.lanes)
    at, live = pairs.p_pairs + (head * C.half + pair) * 4, pair < C.half
    slot_a, slot_b = tl.load(at, mask=live, other=K.dim), tl.load(at + 1, mask=live, other=K.dim)
    return slot_a, slot_b, tl.load(at + 2, mask=live, other=0), tl.load(at + 3, mask=live, other=0)


@triton.jit
def to_channels(steps_a, steps_b, in_frame, slot_a, slot_b, head, pairs, K: tl.constexpr, C: tl.constexpr):
    """Pairs of channels [.., lanes] of grid steps of pairs of coefficients; in_frame [.., 1]: where offsets of a token are."""
    inside = slot_a < K.dim
    steps_a += tl.load(pairs.p_offsets + in_frame + slot_a, mask=inside & (in_frame >= 0), other=0.0)
    steps_b += tl.load(pairs.p_offsets + in_frame + slot_b, mask=inside & (in_frame >= 0), other=0.0)
    at = pairs.p_pair_weights + (head * C.half + tl.arange(0, C.lanes)) * 4
    first_a, second_a = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    first_b, second_b = tl.load(at + 2, mask=inside, other=0.0), tl.load(at + 3, mask=inside, other=0.0)
    return steps_a * first_a + steps_b * first_b, steps_a * second_a + steps_b * second_b


def dequantize_streams(
    pair: tuple[Tensor, Tensor],
    blocks: BlockTable,
    streams: Streams,
    case: KernelConfig,
    rope_state: Tensor | None,
    rope_scale: float,
    columns: range,
    tokens: range,
) -> None:
    """`dequantize.dequantize` of trellis-coded streams; values are written as coefficients in grid steps, times norms."""
    keys, values = pair
    element = tl.float32 if keys.dtype == torch.float32 else tl.float16
    grid = (len(columns), len(keys) * keys.shape[1])
    stride = 0 if rope_state is None or len(rope_state) == 1 else rope_state.stride(0)
    span = columns.start, tokens.start, tokens.stop, keys.shape[2]
    key_layout, value_layout = blocks.layouts
    size = grid[0] * grid[1] * max(key_layout.tile, value_layout.tile, 1)
    tiles = torch.empty(size, dtype=torch.float32 if element is tl.float32 else torch.float16, device=keys.device)
    table = Blocks(blocks.table, blocks.starts, blocks.bases)
    with torch.cuda.device_of(keys):
        dequantize_stream_keys[grid](
            keys, table, blocks.starts if rope_state is None else rope_state, tiles, codes_of(streams.keys),
            pairs_of(streams.keys), *span, stride, rope_scale, K=key_layout, C=case, ELEMENT=element, num_warps=WARPS,
        )  # fmt: skip
        dequantize_stream_values[grid](
            values, table, tiles, codes_of(streams.values), *span, V=value_layout, ELEMENT=element, num_warps=WARPS
        )
