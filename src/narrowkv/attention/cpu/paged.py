"""Attention of a few queries over pages of an engine's memory, compiled: the kernel of `decode`, given blocks by a table.

Sequences of any lengths go in one call. What new tokens see of each other is exact, as is the first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.attention import tiled
from narrowkv.attention.cpu.decode import KERNELS, LONGEST_SPLIT, MOST_HEAD_DIM, SHORTEST_SPLIT, SPLITS, allows_int16
from narrowkv.attention.cpu.int16 import STREAM_KERNELS
from narrowkv.attention.cpu.streams import StreamValues, key_streams
from narrowkv.attention.cpu.tables import compiled, rope_tables
from narrowkv.attention.inputs import AttentionInputs
from narrowkv.attention.rope import Rope
from narrowkv.codec.frames import FRAME
from narrowkv.codec.memory import address
from narrowkv.store import BLOCK
from narrowkv.store.paged import BLOCKS, PagedLayer, PagedSequence
from narrowkv.store.plans import Plans

NOTHING = [0] * 6  # of a tail


@dataclass(frozen=True)
class PagedTables:
    """What the kernel needs of a layer besides addresses. parts: [2, 8] int64, where each part of a block begins in it."""

    sides: tuple[_kernels.PackedTensor, _kernels.PackedTensor]
    values: StreamValues
    parts: Tensor
    kernels: list[str]  # in int16, that read it, fastest first
    tables: list[Tensor]  # that `sides` point into

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [self.parts, *self.tables]

    @classmethod
    def of(cls, layer: PagedLayer) -> "PagedTables":
        """Made once for each layer."""
        known = layer.plans.get(PagedTables)
        if known is None:
            known = layer.plans.put(cls._made(layer))
        return known

    @classmethod
    def _made(cls, layer: PagedLayer) -> "PagedTables":
        rope = layer.rope
        assert rope is None or isinstance(rope, Rope)
        of_keys, key_tables = key_streams(layer.quantizers[0], rope)
        values = StreamValues.of(layer.quantizers[1])
        keys, more = _side(layer, of_keys)
        of_values, _ = _side(layer, values.streams)
        parts = torch.zeros(2, 8, dtype=torch.int64, device="cpu")
        for row, side in zip(parts, layer.layout.sides, strict=True):
            row[0] = side.streams
            row[5], row[6], row[7] = side.values, side.index, side.offsets
        sides = (keys, of_values)
        kernels = STREAM_KERNELS if all(side.uses_int16 for side in sides) else []
        return cls(sides, values, parts, kernels, [*key_tables, *more, *values.tables])


def _side(layer: PagedLayer, streams: _kernels.Streams) -> tuple[_kernels.PackedTensor, list[Tensor]]:
    return compiled(
        _kernels.PackedTensor,
        bits=8,
        codes=layer.layout.head_dim,
        channel_major=True,
        table=None,
        fixed=False,
        scale=None,
        zero=None,
        ranges=[1, 1, 1],
        exact=0,
        outlier=0,
        int16=None,
        unit=None,
        most=0,
        streams=streams,
    )


def attend_each(parts: Sequence[tuple[AttentionInputs, PagedSequence]], kernel: str | None = None) -> list[Tensor]:
    """Attention of sequences of one layer; results like those of `naive.attend`.

    Queries may have rotated keys and values of their own in `new`; what is before them is read in pages. kernel: like that of
    `decode.attend`. More than 16 queries (so prompts are read), and those that nothing precedes, go to `tiled.attend`.
    """
    prepared = [_prepare(inputs, sequence, kernel) for inputs, sequence in parts]
    problems: dict[str, list[_kernels.Problem]] = {}
    for one in prepared:
        if one is not None:
            problems.setdefault(one.kernel, []).append(one.problem)
    for name, some in problems.items():
        _kernels.attend(kernel=name, threads=torch.get_num_threads(), problems=some)
    return [
        tiled.attend(inputs, sequence) if one is None else one.result()
        for one, (inputs, sequence) in zip(prepared, parts, strict=True)
    ]


@dataclass(frozen=True)
class Prepared:
    """A call of the kernel, and what it points into. output, totals: as `decode.Prepared` has them."""

    kernel: str
    problem: _kernels.Problem
    output: Tensor
    totals: Tensor
    values: StreamValues
    tensors: list[Tensor | None]

    def result(self) -> Tensor:
        """Attention, once the kernel has run."""
        return self.values.sums.channels(self.output[0], self.totals) + self.output[1]


def _prepare(inputs: AttentionInputs, sequence: PagedSequence, kernel: str | None) -> Prepared | None:
    query, first = inputs.query, sequence.first
    tokens, head_dim = inputs.past - first, query.shape[3]
    if tokens <= 0 or inputs.queries > tiled.FEW_QUERIES or query.dtype == torch.float64 or head_dim > MOST_HEAD_DIM:
        return None
    layer = sequence.layer
    tables, layout = PagedTables.of(layer), layer.layout
    if kernel is None:
        kernel = tables.kernels[0] if allows_int16(query.dtype) and tables.kernels else KERNELS[0]
    query = query.float().contiguous()
    keys, values = _exact(inputs, sequence)
    hidden = _hidden(inputs, sequence)
    table = _table(sequence, tables, inputs.past)
    output, totals = query.new_empty(2, *query.shape), query.new_empty(query.shape[:3])
    assert layer.rope is None or isinstance(layer.rope, Rope)
    angles = rope_tables(layer.rope, None if layer.rope is None else _anchors(inputs.past)[None, first : inputs.past], 1)
    positions, starts = angles.positions, _starts(len(table))
    sink_index = torch.zeros(1, 1, dtype=torch.int64, device="cpu") if first == 0 else None
    sink_logits = None if inputs.sink_logits is None else inputs.sink_logits.float().contiguous()
    problem = _kernels.Problem(
        keys=tables.sides[0],
        values=tables.sides[1],
        rotation=angles.rotation,
        chunk=min(max(len(table) * layout.kv_heads // SPLITS, SHORTEST_SPLIT), LONGEST_SPLIT) // 4 * 4,
        shape=[1, query.shape[1], layout.kv_heads, inputs.queries, head_dim],
        blocks=len(table),
        tokens=tokens,
        tail=0,
        dense=keys.shape[2],
        output=address(output, torch.float32),
        totals=address(totals, torch.float32),
        packed_query=address(query, torch.float32),
        dense_query=address(query, torch.float32),
        dense_keys=address(keys, torch.float32, shape=(1, layout.kv_heads, keys.shape[2], head_dim)),
        dense_values=address(values, torch.float32, shape=keys.shape),
        keys_tail=NOTHING,
        values_tail=NOTHING,
        positions=0 if positions is None else address(positions[0], torch.int32),
        position_stride=0 if positions is None else positions.stride(0),
        angles=0,
        table=address(table, torch.int64),
        starts=address(starts, torch.int64),
        hidden=address(hidden, torch.bool),
        hidden_batch=0 if hidden is None else 1,
        sink_index=address(sink_index, torch.int64),
        sinks=0 if sink_index is None else 1,
        sink_logits=address(sink_logits, torch.float32, shape=[query.shape[1]]),
        key_offsets=0,
        value_bias=0,
        scaling=inputs.scaling,
        softcap=inputs.softcap or 0.0,
    )
    used = [query, keys, values, hidden, table, positions, starts, sink_index, sink_logits]
    return Prepared(kernel, problem, output, totals, tables.values, used)


def _exact(inputs: AttentionInputs, sequence: PagedSequence) -> tuple[Tensor, Tensor]:
    """Keys and values that are not read in blocks: the first token's, if it is stored, and new ones."""
    layout = sequence.layer.layout
    nothing = inputs.query.new_zeros(1, layout.kv_heads, 0, layout.head_dim)
    pairs = [*([sequence.sink()] if sequence.first == 0 else []), inputs.new or (nothing, nothing)]
    keys, values = (torch.cat([part.float() for part in side], dim=2).contiguous() for side in zip(*pairs, strict=True))
    return keys, values


def _hidden(inputs: AttentionInputs, sequence: PagedSequence) -> Tensor | None:
    """What each query does not see: [1, queries, tokens in blocks, then exact ones] bool; None where all see everything."""
    if inputs.queries == 1 and inputs.mask.sliding_window is None:
        return None
    first = sequence.first
    hidden = inputs.hidden(first)[:, 0]
    packed = inputs.past - first
    return torch.cat([hidden[..., :packed], *([hidden[..., :1]] if first == 0 else []), hidden[..., packed:]], dim=2)


def _table(sequence: PagedSequence, tables: PagedTables, past: int) -> Tensor:
    """Addresses of the blocks from the sequence's first on: [blocks, 2, 8] int64, as `store.block_table` has them."""
    layer = sequence.layer
    blocks = torch.arange(sequence.first // BLOCK, -(-past // BLOCK), dtype=torch.int64, device="cpu")
    starts = layer.memory.data_ptr() + sequence.pages[blocks // BLOCKS] * layer.memory.stride(0)
    found = (starts + blocks % BLOCKS * layer.layout.block_bytes)[:, None, None] + tables.parts
    for absent in (1, 2, 3, 4):
        found[:, :, absent] = 0
    for row, side in enumerate(layer.layout.sides):
        if not side.budget:
            found[:, row, 5:] = 0
    return found


@dataclass(frozen=True)
class Counting:
    """Rows that all sequences share. anchors: [n] int32, by `steps_to_anchors` where positions follow each other from 0.
    starts: [n] int64, the first token of each block.
    """

    anchors: Tensor
    starts: Tensor

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [self.anchors, self.starts]


_plans = Plans()


def _counting(tokens: int) -> Counting:
    known = _plans.get(Counting)
    if known is None or tokens > len(known.anchors):
        every = torch.arange(2 * tokens, dtype=torch.int32, device="cpu")
        starts = torch.arange(2 * tokens // BLOCK + 2, dtype=torch.int64, device="cpu") * BLOCK
        known = _plans.put(Counting(every + FRAME - every % FRAME, starts))
    return known


def _anchors(tokens: int) -> Tensor:
    return _counting(tokens).anchors


def _starts(blocks: int) -> Tensor:
    return _counting(blocks * BLOCK).starts[: blocks + 1]
