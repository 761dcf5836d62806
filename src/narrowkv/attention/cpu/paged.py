"""Attention of a few queries over pages of an engine's memory, compiled: the kernel of `decode`, given blocks by a table.

Sequences of any lengths go in one call. What new tokens see of each other is exact, as is the first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.attention import tiled
from narrowkv.attention.cpu.decode import MOST_HEAD_DIM, ExactTokens, Prepared, fastest_kernel, run, split_length
from narrowkv.attention.cpu.int16 import STREAM_KERNELS
from narrowkv.attention.cpu.streams import StreamValues, key_streams
from narrowkv.attention.cpu.tables import compiled, rope_tables
from narrowkv.attention.inputs import AttentionInputs
from narrowkv.attention.rope import Rope
from narrowkv.codec.memory import address
from narrowkv.store import BLOCK
from narrowkv.store.paged import PagedLayer, PagedSequence
from narrowkv.store.plans import Plans
from narrowkv.store.runs import BLOCKS

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
        return [self.parts, *self.values.matrix.tensors(), *self.tables]

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
    return run([_prepare(inputs, sequence, kernel) for inputs, sequence in parts], parts)


def _prepare(inputs: AttentionInputs, sequence: PagedSequence, kernel: str | None) -> Prepared | None:
    query, first, layer = inputs.query, sequence.first, sequence.layer
    tokens, head_dim = inputs.past - first, query.shape[3]
    if tokens <= 0 or inputs.queries > tiled.FEW_QUERIES or query.dtype == torch.float64 or head_dim > MOST_HEAD_DIM:
        return None
    tables, heads = PagedTables.of(layer), layer.layout.kv_heads
    kernel = kernel or fastest_kernel(query.dtype, tables.kernels)
    query = query.float().contiguous()
    output, hidden, table = torch.empty_like(query), _hidden(inputs, sequence), _table(sequence, tables, inputs.past)
    exact = [ExactTokens.of(*pair) for pair in (sequence.sink() if first == 0 else None, inputs.new) if pair]
    rope, counting = rope_tables(inputs.rope, inputs.rope_state, 1), counting_to(inputs.past)
    sink_logits = None if inputs.sink_logits is None else inputs.sink_logits.float().contiguous()
    problem = _kernels.Problem(
        keys=tables.sides[0],
        values=tables.sides[1],
        rotation=rope.rotation,
        chunk=split_length(len(table) * heads),
        shape=[1, query.shape[1], heads, inputs.queries, head_dim],
        blocks=len(table),
        tokens=tokens,
        tail=0,
        stored=tokens,
        output=address(output, torch.float32),
        packed_query=address(query, torch.float32),
        exact_query=address(query, torch.float32),
        exact=[part.place() for part in exact],
        keys_tail=NOTHING,
        values_tail=NOTHING,
        positions=rope.positions,
        position_stride=rope.position_stride,
        angles=address(rope.angles, torch.float32),
        table=address(table, torch.int64),
        starts=address(counting.starts, torch.int64),
        hidden=address(hidden, torch.bool),
        hidden_batch=0 if hidden is None else 1,
        sink_index=address(counting.sink, torch.int64),
        sinks=1 if first == 0 else 0,
        sink_logits=address(sink_logits, torch.float32, shape=[query.shape[1]]),
        key_offsets=0,
        value_bias=0,
        value_matrix=address(tables.values.matrix.matrix, torch.float32),
        value_mean=address(tables.values.matrix.mean, torch.float32),
        value_rows=tables.values.matrix.rows,
        scaling=inputs.scaling,
        softcap=inputs.softcap or 0.0,
    )
    return Prepared(kernel, problem, output, [query, exact, hidden, table, rope, counting, sink_logits, tables])


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
    """Rows that all sequences share, [n] each. positions: int32, from 0 on. starts: int64, the first token of each block.
    sink: [1, 1] int64, the first token.
    """

    positions: Tensor
    starts: Tensor
    sink: Tensor

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [self.positions, self.starts, self.sink]


_plans = Plans()


def counting_to(tokens: int) -> Counting:
    """For sequences of up to this many tokens."""
    known = _plans.get(Counting)
    if known is None or tokens > len(known.positions):
        every = torch.arange(2 * tokens, dtype=torch.int32, device="cpu")
        starts = torch.arange(2 * tokens // BLOCK + 2, dtype=torch.int64, device="cpu") * BLOCK
        known = _plans.put(Counting(every, starts, torch.zeros(1, 1, dtype=torch.int64, device="cpu")))
    return known
