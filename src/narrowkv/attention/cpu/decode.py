"""Attention of a few queries on a CPU, compiled: reads packed blocks in place, a tile in the nearest cache at a time.

The open tail is dequantized alongside, and what is exact (attention sinks, the window, new tokens) goes as one split. All is
computed in float32, or in int16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.attention import tiled
from narrowkv.attention.cpu.int16 import AVX2_INT16, INT16, STREAM_KERNELS, supports
from narrowkv.attention.cpu.streams import Streams, StreamValues, steps_to_anchors
from narrowkv.attention.cpu.tables import packed_tensor_args, rope_tables, rotary_layout
from narrowkv.attention.head_transform import bias_scores, head_rotation, rotate_query, rotate_value_bias, unrotate_output
from narrowkv.attention.inputs import AttentionInputs
from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.attention.support import require_supported
from narrowkv.codec import Scheme
from narrowkv.codec.cpu.encode import KINDS
from narrowkv.codec.memory import HALVES, address
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import LayerStore, addresses

SPLITS = 64  # about this many splits of work for any number of threads, so that sums do not depend on it
SHORTEST_SPLIT, LONGEST_SPLIT = 8, 64  # blocks
KERNELS = [name for name in ("avx512", "avx2") if name in _kernels.instruction_sets()] + ["generic"]
MOST_HEAD_DIM = 512  # that kernels have space for


@dataclass(frozen=True)
class PackedBlocks:
    """The sealed blocks of a store, as the kernel reads them."""

    version: int  # of `SealedBlocks`
    table: Tensor  # [columns, batch, 2, 8] int64 addresses
    starts: Tensor  # [columns + 1] int64
    sides: tuple[_kernels.PackedTensor, _kernels.PackedTensor]
    head_rotations: tuple[Tensor | None, Tensor | None]  # by which keys, and values, are rotated
    value_bias: Tensor | None  # as the codes see it
    int16_kernels: list[str]  # that read them, fastest first
    stream_values: StreamValues | None
    anchors: Tensor | None  # of keys in streams, by `steps_to_anchors`
    tables: list[Tensor]  # that `sides` point into

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        parts = (self.table, self.starts, *self.head_rotations, self.value_bias, self.anchors, *self.tables)
        return [part for part in parts if part is not None]

    def rope_state_of(self, rope_state: Tensor | None, tokens: int) -> Tensor | None:
        """What the rotary embedding needs of each token in blocks and tail."""
        if rope_state is None:
            return None
        return rope_state[:, :tokens] if self.anchors is None else rope_state[:, :tokens] + self.anchors[:tokens]

    def channels(self, store: LayerStore, sums: Tensor, totals: Tensor | None) -> Tensor:
        """Sums of values as their codes see them, rotated back. totals: of weights, where values are streams."""
        if self.stream_values is None or totals is None:
            return unrotate_output(store.quantizers[1], self.head_rotations[1], sums)
        return self.stream_values.sums.channels(sums, totals)


@dataclass(frozen=True)
class RotatedSinks:
    """The keys of attention sinks, rotated, and what they were rotated from."""

    rope: AnyRope
    keys: Tensor
    rope_state: Tensor
    rotated: Tensor

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [self.keys, self.rope_state, self.rotated]


@dataclass(frozen=True)
class Prepared:
    """A call of the kernel, and what it points into.

    output: [2, batch, query_heads, queries, head_dim], what blocks and what exact tokens contribute; totals: of weights, where
    values are streams.
    """

    kernel: str
    problem: _kernels.Problem
    output: Tensor
    totals: Tensor | None
    blocks: PackedBlocks
    store: LayerStore
    tensors: list[Tensor | None]

    def result(self) -> Tensor:
        """Attention, once the kernel has run."""
        return self.blocks.channels(self.store, self.output[0], self.totals) + self.output[1]


def attend(inputs: AttentionInputs, store: LayerStore, kernel: str | None = None) -> Tensor:
    """Attention of the newest queries over the packed cache; result like that of `naive.attend`.

    kernel: one of KERNELS, which compute in float32, or INT16 or AVX2_INT16; by default the fastest of the latter two that
    reads such a cache, for queries of 16 bits and where `torch.set_float32_matmul_precision` lets products of float32 be
    rounded. Caches without a sealed block, more than 16 queries (so prompts are read), heads of more than 512 channels, and
    queries in float64 go to `tiled.attend`.
    Raises UnsupportedModelError off the CPU, for elements stored in float64, and for keys rotated by Hadamard before the
    rotary embedding.
    """
    return attend_each([(inputs, store)], kernel)[0]


def attend_each(parts: Sequence[tuple[AttentionInputs, LayerStore]], kernel: str | None = None) -> list[Tensor]:
    """`attend` of several sequences of any lengths, or batches, in one call of the kernel; bit for bit as each alone."""
    prepared = [_prepare(inputs, store, kernel) for inputs, store in parts]
    problems: dict[str, list[_kernels.Problem]] = {}
    for one in prepared:
        if one is not None:
            problems.setdefault(one.kernel, []).append(one.problem)
    for name, some in problems.items():
        _kernels.attend(kernel=name, threads=torch.get_num_threads(), problems=some)
    return [
        tiled.attend(inputs, store) if one is None else one.result()
        for one, (inputs, store) in zip(prepared, parts, strict=True)
    ]


def _prepare(inputs: AttentionInputs, store: LayerStore, kernel: str | None) -> Prepared | None:
    """A call of the kernel, named by `kernel` or chosen; None where plain torch attends."""
    query, scaling, sink_logits = inputs.query, inputs.scaling, inputs.sink_logits
    if query.device.type != "cpu":
        raise UnsupportedModelError(f"Backend cpu reads memory of the CPU, not of {query.device}; choose backend torch.")
    require_supported("cpu", store, inputs.rope)
    sealed = min(store.blocks.tokens, inputs.past - store.first)
    beyond = query.shape[2] > tiled.FEW_QUERIES or query.dtype == torch.float64 or query.shape[3] > MOST_HEAD_DIM
    if beyond or sealed <= 0:
        return None
    rope = inputs.rope if inputs.rope_state is not None else None
    blocks = _blocks(store, rope)
    if kernel is None:
        kernel = blocks.int16_kernels[0] if allows_int16(query.dtype) and blocks.int16_kernels else KERNELS[0]
    query = query.float().contiguous()
    tail = min(store.tail.tokens, inputs.past - store.first - sealed) if store.tail else 0
    keys, values, tokens = _exact(inputs, store, sealed + tail)
    output = query.new_empty(2, *query.shape)
    totals = None if blocks.stream_values is None else query.new_empty(query.shape[:3])
    packed_query = rotate_query(store.quantizers[0], blocks.head_rotations[0], query)
    rope_tables_ = rope_tables(rope, blocks.rope_state_of(inputs.rope_state, sealed + tail), query.shape[0])
    positions = rope_tables_.positions
    if rope_tables_.angles is not None and kernel in (INT16, AVX2_INT16):
        kernel = KERNELS[0]
    hidden = _hidden(inputs, store, sealed + tail, tokens)
    sinks = None if store.sinks.index is None else (store.sinks.index - store.first).contiguous()
    sink_logits = None if sink_logits is None else sink_logits.float().contiguous()
    heads = keys.shape[1]
    key_offsets = bias_scores(query, store.bias, store.first, sealed + tail, scaling)
    problem = _kernels.Problem(
        keys=blocks.sides[0],
        values=blocks.sides[1],
        rotation=rope_tables_.rotation,
        chunk=min(max(len(blocks.table) * len(query) * heads // SPLITS, SHORTEST_SPLIT), LONGEST_SPLIT) // 4 * 4,
        shape=[len(query), query.shape[1], heads, query.shape[2], query.shape[3]],
        blocks=len(blocks.table),
        tokens=sealed,
        tail=tail,
        dense=keys.shape[2],
        output=address(output, torch.float32),
        totals=address(totals, torch.float32),
        packed_query=address(packed_query, torch.float32, shape=query.shape),
        dense_query=address(query, torch.float32),
        dense_keys=address(keys, torch.float32),
        dense_values=address(values, torch.float32, shape=keys.shape),
        keys_tail=_tail(store, 0),
        values_tail=_tail(store, 1),
        positions=0 if positions is None else address(positions[0], torch.int32),  # rows are strides apart
        position_stride=0 if positions is None else positions.stride(0),
        angles=address(rope_tables_.angles, torch.float32),
        table=address(blocks.table, torch.int64),
        starts=address(blocks.starts, torch.int64, shape=[len(blocks.table) + 1]),
        hidden=address(hidden, torch.bool),
        hidden_batch=0 if hidden is None else len(hidden),
        sink_index=address(sinks, torch.int64),
        sinks=0 if sinks is None else sinks.shape[1],
        sink_logits=address(sink_logits, torch.float32, shape=[query.shape[1]]),
        key_offsets=address(key_offsets, torch.float32),
        value_bias=address(blocks.value_bias, torch.float32),
        scaling=scaling,
        softcap=inputs.softcap or 0.0,
    )
    used = [query, keys, values, packed_query, positions, rope_tables_.angles, hidden, sinks, sink_logits, key_offsets]
    return Prepared(kernel, problem, output, totals, blocks, store, used)


def _tail(store: LayerStore, side: int) -> list[int]:
    """Addresses of what the tail holds of one side, and how many outliers."""
    if store.tail is None:
        return [0] * 6
    buffer = store.tail.buffers[side]
    codes = address(buffer.codes, *((torch.uint8,) if buffer.scheme.bits < 16 else KINDS))
    ranges = (address(buffer.ranges.get(name), torch.float16) for name in ("scale", "zero"))
    return [
        codes,
        *ranges,
        address(buffer.outlier_values, *HALVES),
        address(buffer.outlier_index, torch.int64),
        buffer.outliers,
    ]


def allows_int16(dtype: torch.dtype) -> bool:
    """Whether products of such queries may be rounded: they have 16 bits, or torch may round those of float32."""
    return dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"


def uses_int16(keys: Scheme, values: Scheme, head_dim: int, rope: AnyRope | None) -> bool:
    """Whether a kernel in int16 reads such a cache; rope: of its keys."""
    rotated = rope if keys.transform.pre_rope else None
    if rotated is not None and not isinstance(rotated, Rope):
        return False
    if "trellis" in (keys.datatype, values.datatype):
        return bool(STREAM_KERNELS) and keys.datatype == values.datatype
    return supports(keys, True, head_dim, rotary_layout(rotated)) and supports(values, False, head_dim, (0, False))


def _blocks(store: LayerStore, rope: AnyRope | None) -> PackedBlocks:
    """The store's blocks; made again only where columns have come, gone or changed. rope: of keys stored before it."""
    known = store.plans.get(PackedBlocks)
    if known is None or known.version != store.blocks.version:
        columns = store.blocks.columns
        page = columns[0].page
        keys, values = store.quantizers
        streams = Streams.of(store, rope)
        of_values = streams.values.streams if streams.values else None
        key_side, key_tables = packed_tensor_args(keys, page.keys, True, rope, streams.keys)
        value_side, value_tables = packed_tensor_args(values, page.values, False, None, of_values)
        sides = (key_side, value_side)
        counts = [column.count for column in columns]
        starts = torch.tensor([0, *counts], dtype=torch.int64, device="cpu").cumsum(0)
        head_rotations = (head_rotation(store.quantizers[0]), head_rotation(store.quantizers[1]))
        found = PackedBlocks(
            version=store.blocks.version,
            table=addresses(columns),
            starts=starts,
            sides=sides,
            head_rotations=head_rotations,
            value_bias=rotate_value_bias(store.quantizers[1], head_rotations[1], store.bias.values),
            int16_kernels=_int16_kernels(sides, streams),
            stream_values=streams.values,
            anchors=None if streams.keys is None else steps_to_anchors(starts),
            tables=key_tables + value_tables,
        )
        known = store.plans.put(found)
    return known


def _int16_kernels(sides: tuple[_kernels.PackedTensor, _kernels.PackedTensor], streams: Streams) -> list[str]:
    if not all(side.uses_int16 for side in sides) or (streams.keys is None) != (streams.values is None):
        return []
    return [INT16] if streams.keys is None else STREAM_KERNELS


def _exact(inputs: AttentionInputs, store: LayerStore, packed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that are read neither from blocks nor from the tail: sinks, what is in the exact window, new ones.

    packed: how many tokens blocks and tail have. Returns keys (rotated) and values, [batch, kv_heads, n, head_dim] float32
    each, and where they stand, [batch or 1, n] int64 from the first token stored on; -1 for a sink that is hidden.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    tokens = []
    if store.sinks.elements is not None and store.sinks.index is not None:
        at = store.sinks.index - store.first
        at = at.masked_fill((at < 0) | (at >= packed), -1)
        parts.append(_sinks(inputs, store, at))
        tokens.append(at)
    window = inputs.past - store.first - packed
    if window > 0:
        keys, values, _ = store.residual.stored()
        parts.append((inputs.rotate(keys[:, :, :window].float(), packed), values[:, :, :window].float()))
    if inputs.new:
        parts.append((inputs.new[0].float(), inputs.new[1].float()))
    if not parts:
        assert store.shape is not None
        parts.append((torch.zeros(store.shape[0], store.shape[1], 0, store.shape[2], dtype=torch.float32, device="cpu"),) * 2)
    every_key, every_value = zip(*parts, strict=True)
    keys, values = torch.cat(every_key, dim=2).contiguous(), torch.cat(every_value, dim=2).contiguous()
    last = packed + keys.shape[2] - (store.sinks.count if tokens else 0)
    tokens.append(torch.arange(packed, last, dtype=torch.int64, device="cpu").expand(len(tokens[0]) if tokens else 1, -1))
    return keys, values, torch.cat(tokens, dim=1)


def _sinks(inputs: AttentionInputs, store: LayerStore, at: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (rotated) and values of sinks, float32; rotated again only where they, or their positions, have changed."""
    assert store.sinks.elements is not None
    keys, values = store.sinks.elements
    rope = inputs.rope
    if rope is None or inputs.rope_state is None:
        return keys.float(), values.float()
    rope_state = inputs.rope_state_at(at)
    known = store.plans.get(RotatedSinks)
    fits = known is not None and known.rope is rope and torch.equal(keys, known.keys)
    if known is None or not fits or not torch.equal(rope_state, known.rope_state):
        known = store.plans.put(RotatedSinks(rope, keys.clone(), rope_state, rope.rotate(keys.float(), rope_state)))
    return known.rotated, values.float()


def _hidden(inputs: AttentionInputs, store: LayerStore, packed: int, tokens: Tensor) -> Tensor | None:
    """What each query does not see: [batch or 1, queries, packed + exact tokens] bool, None where all see everything."""
    mask, queries = inputs.mask, inputs.query.shape[2]
    plain = mask.rule is None and mask.padding is None and mask.sliding_window is None
    if plain and queries == 1 and not bool((tokens < 0).any()):
        return None
    hidden = inputs.hidden(store.first)[:, 0]  # [batch or 1, queries, all tokens]
    rows = max(len(hidden), len(tokens))
    hidden, tokens = hidden.expand(rows, -1, -1), tokens.expand(rows, -1)
    exact = hidden.gather(2, tokens.clamp(min=0)[:, None].expand(-1, queries, -1)) | (tokens < 0)[:, None]
    return torch.cat([hidden[..., :packed], exact], dim=2)
