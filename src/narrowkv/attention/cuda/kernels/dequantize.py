"""Triton: sealed blocks as elements, [batch, heads, tokens, head_dim], for the attention of prompts; and what launches that.

A program dequantizes one block of one KV head of one sequence, its keys or its values, and rotates keys as it writes them.
Where keys have outliers, those are written first, a thread each, and another kernel rotates what was written. Elements
are looked up in float16 for results in 16 bits, else in float32; keys are rotated in float32.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowkv.attention.cuda.block_table import BlockTable
from narrowkv.attention.cuda.kernels.attend_packed import read_keys, read_values
from narrowkv.attention.cuda.kernels.common import angles, cos_sin, pair_channels
from narrowkv.attention.cuda.kernels.layout import KernelConfig
from narrowkv.attention.cuda.kernels.lookup import load_levels
from narrowkv.attention.cuda.kernels.outliers import outlier_values
from narrowkv.attention.cuda.kernels.prefetch import outlier_range
from narrowkv.attention.cuda.kernels.unpack import column_indices

WARPS = 4
SPAN = ["batch", "column", "begin", "stop", "capacity"]  # prompts of any length are one program


@triton.jit(do_not_specialize=SPAN)
def dequantize_keys(
    keys, table, starts, bases, levels, level_bytes, scale, zero, near, cycles, rope_state,
    batch, column, begin, stop, capacity, rope_state_stride, rope_scale,
    K: tl.constexpr, C: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Keys of columns from `column` on, [batch, heads, capacity, head_dim], from the token `begin` to before `stop` of those
    stored.

    table, starts, bases, cycles, rope_state: like those of `attend_blocks`; near: of `angles_of_tokens`; rope_scale: the
    factor of the rotary embedding. Outliers are left as their codes have them.
    """
    i, batch_head = column + tl.program_id(0), tl.program_id(1)
    row, head = batch_head // K.heads, batch_head % K.heads
    entry = table + (i * batch + row) * 16
    channel_a, channel_b = pair_channels(C)
    token = column_indices(K)
    levels_a = load_levels(level_bytes, head, channel_a, K, ELEMENT)
    levels_b = load_levels(level_bytes, head, channel_b, K, ELEMENT)
    keys_a, keys_b = read_keys(entry, entry, levels_a, levels_b, levels, scale, zero, head, token, K, C, ELEMENT)
    start = tl.load(starts + i)
    live = token < tl.minimum(tl.load(starts + i + 1), stop) - start
    keys_a, keys_b = tl.trans(keys_a.to(tl.float32)), tl.trans(keys_b.to(tl.float32))
    if C.rope_mode != "none":
        rope_state += row.to(tl.int64) * rope_state_stride
        cos, sin = angles_of_tokens(token, live, start, bases + i * batch + row, near, cycles, rope_state, rope_scale, C)
        keys_a, keys_b = keys_a * cos - keys_b * sin, keys_b * cos + keys_a * sin
    keys += (batch_head.to(tl.int64) * capacity + (start - begin)) * C.dim
    inside = live[:, None] & (tl.arange(0, C.lanes) < C.half)[None, :]
    at = token[:, None] * C.dim
    tl.store(keys + at + channel_a[None, :], keys_a, mask=inside)
    tl.store(keys + at + channel_b[None, :], keys_b, mask=inside)


@triton.jit(do_not_specialize=SPAN)
def dequantize_values(
    values, table, starts, levels, level_bytes, scale, zero, batch, column, begin, stop, capacity,
    V: tl.constexpr, K: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Values of columns, as `dequantize_keys` does it."""
    i, batch_head = column + tl.program_id(0), tl.program_id(1)
    row, head = batch_head // V.heads, batch_head % V.heads
    entry = table + (i * batch + row) * 16 + 8
    token, channel = column_indices(K), column_indices(V)
    row_levels = load_levels(level_bytes, head, tl.arange(0, V.row_capacity), V, ELEMENT)
    elements = tl.trans(read_values(entry, entry, row_levels, levels, scale, zero, head, token, V, ELEMENT))
    start = tl.load(starts + i)
    live = token < tl.minimum(tl.load(starts + i + 1), stop) - start
    values += (batch_head.to(tl.int64) * capacity + (start - begin)) * V.dim
    inside = live[:, None] & (channel < V.dim)[None, :]
    tl.store(values + token[:, None] * V.dim + channel[None, :], elements, mask=inside)


@triton.jit(do_not_specialize=SPAN)
def put_block_outliers(elements, table, starts, batch, column, begin, stop, capacity, side: tl.constexpr, F: tl.constexpr):
    """Write the outliers of columns over dequantized elements, a thread each. side: 0 for keys, 1 for values."""
    i, batch_head = column + tl.program_id(0), tl.program_id(1)
    row, head = batch_head // F.heads, batch_head % F.heads
    entry = table + (i * batch + row) * 16 + side * 8
    start = tl.load(starts + i)
    count = tl.minimum(tl.load(starts + i + 1), stop) - start
    elements += (batch_head.to(tl.int64) * capacity + (start - begin)) * F.dim
    index = tl.load(entry + 6).to(tl.pointer_type(tl.int16))
    first, last = outlier_range(tl.load(entry + 7), head)
    for some in range(first, last, F.nonzeros):
        which = some + tl.arange(0, F.nonzeros)
        found = tl.load(index + which, mask=which < last, other=0).to(tl.int32)
        live = (which < last) & (found // F.dim < count)
        tl.store(elements + found, outlier_values(entry, which, live, F), mask=live)


@triton.jit(do_not_specialize=SPAN)
def rotate_keys(
    keys, starts, bases, near, cycles, rope_state, batch, column, begin, stop, capacity, rope_state_stride, rope_scale,
    HEADS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rotate dequantized keys of columns where they lie."""
    i, batch_head = column + tl.program_id(0), tl.program_id(1)
    row = batch_head // HEADS
    channel_a, channel_b = pair_channels(C)
    token = tl.arange(0, 64)
    start = tl.load(starts + i)
    live = token < tl.minimum(tl.load(starts + i + 1), stop) - start
    inside = live[:, None] & (tl.arange(0, C.lanes) < C.half)[None, :]
    keys += (batch_head.to(tl.int64) * capacity + (start - begin)) * C.dim
    at_a, at_b = token[:, None] * C.dim + channel_a[None, :], token[:, None] * C.dim + channel_b[None, :]
    keys_a = tl.load(keys + at_a, mask=inside, other=0.0).to(tl.float32)
    keys_b = tl.load(keys + at_b, mask=inside, other=0.0).to(tl.float32)
    rope_state += row.to(tl.int64) * rope_state_stride
    cos, sin = angles_of_tokens(token, live, start, bases + i * batch + row, near, cycles, rope_state, rope_scale, C)
    tl.store(keys + at_a, keys_a * cos - keys_b * sin, mask=inside)
    tl.store(keys + at_b, keys_b * cos + keys_a * sin, mask=inside)


@triton.jit
def angles_of_tokens(token, live, start, base, near, cycles, rope_state, rope_scale, C: tl.constexpr):
    """Cosine and sine, times `rope_scale`, by which pairs rotate at tokens of a block: [tokens, lanes] float32 each.

    base: where the position of the block's first token is. Where others follow it, their angles are those of the positions 0
    to 63, near: [2, 64, pairs], rotated on by the first; else they are those of `angles`.
    """
    pair = tl.arange(0, C.lanes)[None, :]
    if C.rope_mode == "near":
        rope_mode = live[:, None] & (pair < C.pairs)
        at = near + token[:, None] * C.pairs + pair
        cos, sin = tl.load(at, mask=rope_mode, other=1.0), tl.load(at + 64 * C.pairs, mask=rope_mode, other=0.0)
        by_cos, by_sin = cos_sin(tl.load(base), tl.load(cycles + pair, mask=pair < C.pairs, other=0.0))
        cos, sin = cos * by_cos - sin * by_sin, sin * by_cos + cos * by_sin
    else:
        cos, sin = angles(pair, start + token[:, None], live[:, None], near, cycles, rope_state, C)
    factor = tl.where(pair < C.pairs, rope_scale, 1.0)
    return cos * factor, sin * factor


def dequantize(
    pair: tuple[Tensor, Tensor],
    blocks: BlockTable,
    case: KernelConfig,
    rope_state: Tensor | None,
    rope_scale: float,
    columns: range,
    tokens: range,
) -> None:
    """Write keys and values of these columns, which are of these tokens of those stored, to the start of a pair.

    pair: [batch, kv_heads, capacity, head_dim] each, contiguous. rope_state: of each stored token, as `angles` reads it;
    rope_scale: the factor of the rotary embedding. Keys are rotated as the case has it.
    """
    keys, values = pair
    batch = len(keys)
    grid = (len(columns), batch * keys.shape[1])
    span = (batch, columns.start, tokens.start, tokens.stop, keys.shape[2])
    table, starts = blocks.table, blocks.starts
    near = None if blocks.near is None else blocks.near.transpose(1, 2).contiguous()
    near, cycles, rope_state = (table if part is None else part for part in (near, blocks.cycles, rope_state))
    rope_state_stride = 0 if len(rope_state) == 1 else rope_state.stride(0)
    element = tl.float32 if keys.dtype == torch.float32 else tl.float16
    key_form, value_form = (replace(layout, nonzeros=0) for layout in blocks.layouts)
    outliers = [layout.nonzeros > 0 for layout in blocks.layouts]
    with torch.cuda.device_of(keys):
        dequantize_keys[grid](
            keys, table, starts, blocks.bases, *_tables(blocks, 0), near, cycles, rope_state,
            *span, rope_state_stride, rope_scale,
            K=key_form, C=replace(case, rope_mode="none") if outliers[0] else case, ELEMENT=element, num_warps=WARPS,
        )  # fmt: skip
        dequantize_values[grid](
            values, table, starts, *_tables(blocks, 1), *span,
            V=value_form, K=key_form, ELEMENT=element, num_warps=WARPS,
        )  # fmt: skip
        for side, (layout, elements) in enumerate(zip(blocks.layouts, pair, strict=True)):
            if outliers[side]:
                put_block_outliers[grid](
                    elements, table, starts, *span, side=side, F=layout, num_warps=1
                )  # fmt: skip
        if outliers[0] and case.rope_mode != "none":
            rotate_keys[grid](
                keys, starts, blocks.bases, near, cycles, rope_state, *span, rope_state_stride, rope_scale,
                HEADS=keys.shape[1], C=case, num_warps=2 * WARPS,
            )  # fmt: skip


def _tables(blocks: BlockTable, side: int) -> list[Tensor]:
    """Tables of keys, or of values, with a pointer for what is not there and never read."""
    tables = blocks.tables[side]
    return [blocks.starts if part is None else part for part in (tables.table, tables.bytes, tables.scale, tables.zero)]
