"""Attention of a few queries on a CPU, compiled: reads packed blocks in place, a tile in the nearest cache at a time.

The open tail is packed as one more block, and what is exact (attention sinks, the window, new tokens) is read where it lies.
All is computed in float32, or in int16; one call leads from queries to channels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.attention import tiled
from narrowkv.attention.cpu.int16 import AVX2_INT16, INT16, STREAM_KERNELS, supports
from narrowkv.attention.cpu.streams import Streams
from narrowkv.attention.cpu.tables import ValueMatrix, packed_tensor_args, rope_tables, rotary_layout
from narrowkv.attention.head_transform import bias_scores, head_rotation, rotate_query, rotate_value_bias
from narrowkv.attention.inputs import AttentionInputs, Stored
from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.attention.support import require_supported
from narrowkv.codec import Scheme
from narrowkv.codec.cpu.encode import KINDS, locate
from narrowkv.codec.memory import address
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
    rope: AnyRope | None  # of keys that are stored before it
    table: Tensor  # [columns, batch, 2, 8] int64 addresses
    starts: Tensor  # [columns + 1] int64
    sides: tuple[_kernels.PackedTensor, _kernels.PackedTensor]
    key_rotation: Tensor | None  # by which keys are rotated as whole heads
    value_bias: Tensor | None  # as the codes see it
    value_matrix: ValueMatrix
    int16_kernels: list[str]  # that read them, fastest first
    tables: list[Tensor]  # that `sides` point into

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        parts = (self.table, self.starts, self.key_rotation, self.value_bias, *self.value_matrix.tensors(), *self.tables)
        return [part for part in parts if part is not None]


@dataclass(frozen=True)
class Prepared:
    """A call of the kernel, where its result will be, [batch, query_heads, queries, head_dim], and what it points into."""

    kernel: str
    problem: _kernels.Problem
    output: Tensor
    used: list[Any]


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
    return run([_prepare(inputs, store, kernel) for inputs, store in parts], parts)


def run(prepared: Sequence[Prepared | None], parts: Sequence[tuple[AttentionInputs, Stored]]) -> list[Tensor]:
    """The results of calls of the kernel, all of a kernel in one; of parts without a call by `tiled.attend`."""
    problems: dict[str, list[_kernels.Problem]] = {}
    for one in prepared:
        if one is not None:
            problems.setdefault(one.kernel, []).append(one.problem)
    for name, some in problems.items():
        _kernels.attend(kernel=name, threads=torch.get_num_threads(), problems=some)
    return [
        tiled.attend(inputs, store) if one is None else one.output
        for one, (inputs, store) in zip(prepared, parts, strict=True)
    ]


def _prepare(inputs: AttentionInputs, store: LayerStore, kernel: str | None) -> Prepared | None:
    """A call of the kernel, named by `kernel` or chosen; None where plain torch attends."""
    query, sink_logits = inputs.query, inputs.sink_logits
    if query.device.type != "cpu":
        raise UnsupportedModelError(f"Backend cpu reads memory of the CPU, not of {query.device}; choose backend torch.")
    rope = inputs.rope if inputs.rope_state is not None else None
    blocks = _blocks(store, rope)
    stored = inputs.past - store.first
    sealed = min(store.blocks.tokens, stored)
    beyond = query.shape[2] > tiled.FEW_QUERIES or query.dtype == torch.float64 or query.shape[3] > MOST_HEAD_DIM
    if blocks is None or beyond or sealed <= 0:
        return None
    tables = rope_tables(rope, inputs.rope_state, len(query))
    kernel = kernel or fastest_kernel(query.dtype, blocks.int16_kernels)
    if tables.angles is not None and kernel in (INT16, AVX2_INT16):
        kernel = KERNELS[0]
    query = query.float().contiguous()
    tail = min(store.tail.tokens, stored - sealed) if store.tail else 0
    exact = _exact(inputs, store, sealed + tail)
    output, heads = torch.empty_like(query), blocks.value_matrix.heads
    packed_query = rotate_query(store.quantizers[0], blocks.key_rotation, query)
    hidden = _hidden(inputs, store, sealed + tail, exact)
    sinks = None if store.sinks.index is None else (store.sinks.index - store.first if store.first else store.sinks.index)
    sink_logits = None if sink_logits is None else sink_logits.float().contiguous()
    key_offsets = bias_scores(query, store.bias, store.first, sealed + tail, inputs.scaling)
    problem = _kernels.Problem(
        keys=blocks.sides[0],
        values=blocks.sides[1],
        rotation=tables.rotation,
        chunk=split_length(len(blocks.table) * len(query) * heads),
        shape=[len(query), query.shape[1], heads, query.shape[2], query.shape[3]],
        blocks=len(blocks.table),
        tokens=sealed,
        tail=tail,
        stored=stored,
        output=output.data_ptr(),
        packed_query=address(packed_query, torch.float32, shape=query.shape),
        exact_query=query.data_ptr(),
        exact=[part.place() for part in exact],
        keys_tail=_tail(store, 0),
        values_tail=_tail(store, 1),
        positions=tables.positions,
        position_stride=tables.position_stride,
        angles=address(tables.angles, torch.float32),
        table=blocks.table.data_ptr(),
        starts=blocks.starts.data_ptr(),
        hidden=address(hidden, torch.bool),
        hidden_batch=0 if hidden is None else len(hidden),
        sink_index=address(sinks, torch.int64),
        sinks=0 if sinks is None else sinks.shape[1],
        sink_logits=address(sink_logits, torch.float32, shape=[query.shape[1]]),
        key_offsets=address(key_offsets, torch.float32),
        value_bias=address(blocks.value_bias, torch.float32),
        value_matrix=address(blocks.value_matrix.matrix, torch.float32),
        value_mean=address(blocks.value_matrix.mean, torch.float32),
        value_rows=blocks.value_matrix.rows,
        scaling=inputs.scaling,
        softcap=inputs.softcap or 0.0,
    )
    used = [query, packed_query, tables, hidden, sinks, sink_logits, key_offsets, exact, blocks, store]
    return Prepared(kernel, problem, output, used)


def split_length(blocks: int) -> int:
    """How many blocks make one split of work; blocks: of all sequences and heads."""
    return min(max(blocks // SPLITS, SHORTEST_SPLIT), LONGEST_SPLIT) // 4 * 4


def fastest_kernel(dtype: torch.dtype, int16_kernels: Sequence[str]) -> str:
    """The kernel for queries of a dtype; int16_kernels: those that read the cache, fastest first."""
    return int16_kernels[0] if int16_kernels and allows_int16(dtype) else KERNELS[0]


def _tail(store: LayerStore, side: int) -> list[int]:
    """Addresses of what the tail holds of one side, and how many outliers."""
    if store.tail is None:
        return [0] * 6
    buffer = store.tail.buffers[side]
    codes, scale, zero, outlier_index, outlier_values = buffer.addresses or locate(buffer)
    return [codes, scale, zero, outlier_values, outlier_index, buffer.outliers]


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


def _blocks(store: LayerStore, rope: AnyRope | None) -> PackedBlocks | None:
    """The store's blocks, None if it has none; made again only where columns have come, gone or changed.

    rope: of keys stored before it. Raises UnsupportedModelError where the kernel does not read such a cache.
    """
    known = store.plans.get(PackedBlocks)
    if known is not None and known.version == store.blocks.version and known.rope is rope:
        return known
    require_supported("cpu", store, rope)
    columns = store.blocks.columns
    if not columns or store.shape is None:
        return None
    page = columns[0].page
    keys, values = store.quantizers
    streams = Streams.of(store, rope)
    of_values = streams.values.streams if streams.values else None
    key_side, key_tables = packed_tensor_args(keys, page.keys, True, rope, streams.keys)
    value_side, value_tables = packed_tensor_args(values, page.values, False, None, of_values)
    sides = (key_side, value_side)
    starts = torch.tensor([0, *(column.count for column in columns)], dtype=torch.int64, device="cpu").cumsum(0)
    return store.plans.put(
        PackedBlocks(
            version=store.blocks.version,
            rope=rope,
            table=addresses(columns),
            starts=starts,
            sides=sides,
            key_rotation=head_rotation(keys),
            value_bias=rotate_value_bias(values, head_rotation(values), store.bias.values),
            value_matrix=streams.values.matrix if streams.values else ValueMatrix.of(values, *store.shape[1:]),
            int16_kernels=_int16_kernels(sides, streams),
            tables=key_tables + value_tables,
        )
    )


def _int16_kernels(sides: tuple[_kernels.PackedTensor, _kernels.PackedTensor], streams: Streams) -> list[str]:
    if not all(side.uses_int16 for side in sides) or (streams.keys is None) != (streams.values is None):
        return []
    return [INT16] if streams.keys is None else STREAM_KERNELS


@dataclass(frozen=True)
class ExactTokens:
    """Keys and values [batch, kv_heads, n, head_dim], read where they lie. rotates: whether keys are yet to be rotated."""

    keys: Tensor
    values: Tensor
    rotates: bool = False

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, rotates: bool = False) -> "ExactTokens":
        """In a dtype that the kernel reads, the channels of each side by side."""
        return cls(_readable(keys), _readable(values), rotates)

    def place(self) -> list[int]:
        """Addresses, kinds and strides, as the kernel takes them."""
        sides = ((side.data_ptr(), KINDS[side.dtype], *side.stride()[:3]) for side in (self.keys, self.values))
        return [*itertools.chain.from_iterable(sides), self.keys.shape[2], self.rotates]


def _readable(elements: Tensor) -> Tensor:
    elements = elements if elements.dtype in KINDS else elements.float()
    return elements if elements.stride(3) == 1 else elements.contiguous()


def _exact(inputs: AttentionInputs, store: LayerStore, packed: int) -> list[ExactTokens]:
    """Tokens that are not read from the `packed` ones of blocks and tail: sinks, what is in the exact window, new ones."""
    parts = []
    rotates = inputs.rope is not None and inputs.rope_state is not None
    if store.sinks.elements is not None:
        parts.append(ExactTokens.of(*store.sinks.elements, rotates))
    window = inputs.past - store.first - packed
    if window > 0:
        keys, values, _ = store.residual.stored()
        parts.append(ExactTokens.of(keys[:, :, :window], values[:, :, :window], rotates))
    if inputs.new:
        parts.append(ExactTokens.of(*inputs.new))
    return parts


def _hidden(inputs: AttentionInputs, store: LayerStore, packed: int, exact: list[ExactTokens]) -> Tensor | None:
    """What each query does not see: [batch or 1, queries, packed + exact tokens] bool, None where all see everything."""
    mask, queries = inputs.mask, inputs.query.shape[2]
    if mask.rule is None and mask.padding is None and mask.sliding_window is None and queries == 1:
        return None
    hidden = inputs.hidden(store.first)[:, 0]  # [batch or 1, queries, all tokens]
    if store.sinks.index is None:
        return hidden.contiguous()
    sinks = (store.sinks.index - store.first).clamp(min=0)
    hidden = hidden.expand(len(sinks), -1, -1)
    of_sinks = hidden.gather(2, sinks[:, None].expand(-1, queries, -1))
    return torch.cat([hidden[..., :packed], of_sinks, hidden[..., packed:]], dim=2)
