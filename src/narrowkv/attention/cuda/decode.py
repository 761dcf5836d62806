"""Attention of a few queries on a GPU, by kernels written in Triton: reads packed blocks in place, merges what programs found.

The open tail is dequantized alongside, and what is exact (attention sinks, the window, new tokens) goes as it is. Products
are in 16 bits for queries in 16 bits, else in float32; sums are in float32.
"""

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from narrowkv.attention import tiled
from narrowkv.attention.cuda import prefill
from narrowkv.attention.cuda.arguments import PackedTensorArgs, SharedArgs, packed_tensor_args
from narrowkv.attention.cuda.block_table import BlockTable, block_table_of, kernel_rope_state
from narrowkv.attention.cuda.kernels.layout import KernelConfig, power_of_2
from narrowkv.attention.cuda.stream_tables import Streams
from narrowkv.attention.head_transform import rotate_query, unrotate_output
from narrowkv.attention.inputs import AttentionInputs
from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.attention.support import require_supported
from narrowkv.codec import AnyQuantizer, TrellisQuantizer
from narrowkv.codec.cuda.encode import to_device_async
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import LayerStore

NUM_LENGTHS = 12  # elements of `lengths`
MOST_HEAD_DIM = 256
# queries that share a dequantized tile, half as many in float32, and of streams: more are spilled
FEWEST_ROWS, MOST_ROWS = 8, 32
PROGRAMS = 4  # for each multiprocessor
FEWEST_BLOCKS, MOST_SPLITS = 4, 128  # of a program; of a sequence's blocks


def attend(inputs: AttentionInputs, store: LayerStore) -> Tensor:
    """Attention of the newest queries over the packed cache; result like that of `naive.attend`.

    More than 16 queries (so prompts are read) go to `prefill.attend`, queries in float64 to `tiled.attend`. Raises
    UnsupportedModelError where Triton or the GPU is missing, for elements stored in float64, for heads of more than 256
    channels, and for keys rotated by Hadamard before the rotary embedding.
    """
    _require(inputs, store)
    if inputs.query.dtype == torch.float64:
        return tiled.attend(inputs, store)
    if inputs.queries > tiled.FEW_QUERIES:
        return prefill.attend(inputs, store)
    return prepare(inputs, store)()


@dataclass(frozen=True)
class DecodePlan:
    """One call of attention, all set: calling it launches kernels, and nothing else, so that a CUDA graph may capture it."""

    launch: Any
    query: Tensor
    lengths: Tensor
    parts: tuple[Any, Any, Any]
    plan: Any
    elements: tuple[float, float, float]
    quantizers: tuple[AnyQuantizer, AnyQuantizer]
    blocks: BlockTable
    streams: Streams | None

    def __call__(self) -> Tensor:
        """[batch, query_heads, queries, head_dim] float32."""
        query, (keys, values), blocks = self.query, self.quantizers, self.blocks
        packed = rotate_query(keys, blocks.head_rotations[0], query.float()) if blocks.rotated[0] else query
        found: Tensor = self.launch.attend(packed, query, self.lengths, self.parts, self.plan, *self.elements)
        if self.streams is not None:
            return self.streams.sums.channels(found[0], found[0, ..., -1]) + found[1, ..., :-1]
        return unrotate_output(values, blocks.head_rotations[1], found[0]) + found[1] if self.plan.apart else found[0]


def prepare(inputs: AttentionInputs, store: LayerStore, device_lengths: Tensor | None = None) -> DecodePlan:
    """`attend` of up to 16 queries, but for its kernels; what they read must stay where it is until they have run.

    device_lengths: `lengths` on the device, if a CUDA graph is captured; `rope_state` is then of all for which there is space.
    Raises UnsupportedModelError where a rule hides tokens from a captured step.
    """
    launch = _require(inputs, store)
    query, new, mask = inputs.query, inputs.new, inputs.mask
    rope = inputs.rope if inputs.rope_state is not None else None
    rope_state = kernel_rope_state(rope, inputs.rope_state)
    blocks = block_table_of(store, rope, rope_state, mask.padding)
    if device_lengths is None:
        device_lengths = to_device_async(lengths(store, blocks, inputs.past, inputs.length, inputs.queries), query.device)
    elif mask.rule is not None:
        raise UnsupportedModelError("A mask by rule cannot be captured in a CUDA graph; decode without one.")
    case, streams = _case(inputs, store, blocks), Streams.of(store, inputs.rope)
    shared = SharedArgs(
        **blocks.shared(),
        rope_state=rope_state,
        padding=mask.padding.view(torch.uint8) if case.padding and mask.padding is not None else None,
        hidden=inputs.hidden(store.first)[:, 0].contiguous().view(torch.uint8) if case.hidden else None,
        sink_index=store.sinks.index,
        sink_logits=inputs.sink_logits,
    )
    splits = _splits(query, store, blocks, case)
    plan = launch.LaunchConfig(*blocks.layouts, case, splits, blocks.rotated[1], query.dtype != torch.float32)
    tables = (streams.keys, streams.values) if streams else (None, None)
    sides = [PackedTensorArgs(**packed_tensor_args(store, blocks, i, new[i] if new else None, tables[i])) for i in range(2)]
    return DecodePlan(
        launch=launch,
        query=query.contiguous(),
        lengths=device_lengths,
        parts=(sides[0], sides[1], shared),
        plan=plan,
        elements=(inputs.scaling, inputs.softcap or 0.0, rope.scaling if isinstance(rope, Rope) else 1.0),
        quantizers=store.quantizers,
        blocks=blocks,
        streams=streams,
    )


@functools.cache
def _launch() -> ModuleType | None:
    """The module that launches kernels; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("narrowkv.attention.cuda.launch")


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on a device: a GPU that Triton compiles for, or any memory where it interprets them."""
    launch = _launch()
    return launch is not None and (device.type == "cuda" or bool(launch.INTERPRETED))


def _require(inputs: AttentionInputs, store: LayerStore) -> Any:
    """The module that launches kernels; raises UnsupportedModelError where they do not read a cache of such keys."""
    if _launch() is None:
        raise UnsupportedModelError("Backend cuda needs Triton; install it (`pip install triton`), or choose backend torch.")
    if not runs_on(inputs.query.device):
        raise UnsupportedModelError(f"Backend cuda reads memory of a GPU, not of {inputs.query.device}; choose backend torch.")
    require_supported("cuda", store, inputs.rope)
    if store.bias.tensors():
        raise UnsupportedModelError("Backend cuda does not put back what projections add to keys; choose backend torch.")
    dim = inputs.query.shape[3]
    if dim > MOST_HEAD_DIM or dim % 8:
        raise UnsupportedModelError(
            f"Backend cuda reads heads of up to {MOST_HEAD_DIM} channels, a multiple of 8, not of {dim}; choose backend torch."
        )
    return _launch()


def _case(inputs: AttentionInputs, store: LayerStore, blocks: BlockTable) -> KernelConfig:
    assert store.shape is not None
    query, mask = inputs.query, inputs.mask
    rows = query.shape[1] // store.shape[1] * inputs.queries
    hidden = mask.rule is not None
    exact = torch.get_float32_matmul_precision() == "highest" and query.dtype == torch.float32
    dearer = (query.dtype.itemsize != 2) + isinstance(store.quantizers[0], TrellisQuantizer)
    return KernelConfig(
        rows=rows,
        capacity=min(max(power_of_2(rows), FEWEST_ROWS), MOST_ROWS >> dearer),
        queries=inputs.queries,
        sinks=0 if store.sinks.index is None else store.sinks.index.shape[1],
        softcap=inputs.softcap is not None,
        padding=mask.padding is not None and not hidden,
        window=0 if hidden else mask.sliding_window or 0,
        hidden=hidden,
        precision="ieee" if exact else "tf32",
        **blocks.rope_config(inputs),
    )


def _splits(query: Tensor, store: LayerStore, blocks: BlockTable, case: KernelConfig) -> int:
    """How many programs share the blocks of a head: enough to keep a GPU busy, by how many blocks there is capacity for."""
    assert store.shape is not None
    programs = PROGRAMS * _multiprocessors(query.device)
    others = query.shape[0] * store.shape[1] * -(-case.rows // case.capacity)
    return max(min(-(-programs // others), blocks.capacity // FEWEST_BLOCKS, MOST_SPLITS), 1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def blocks_for(store: LayerStore, rope: AnyRope | None, rope_state: Tensor | None, padding: Tensor | None) -> BlockTable:
    """The store's blocks as the next step reads them; rope_state, padding: like those of `attend`, which looks at new ones
    alone.
    """
    rope = rope if rope_state is not None else None
    return block_table_of(store, rope, kernel_rope_state(rope, rope_state), padding)


def lengths(store: LayerStore, blocks: BlockTable, past: int, length: int, queries: int, rope_state: int = 0) -> list[int]:
    """Lengths of all parts, in the order of `launch`; rope_state: what of `rope_state` is of the first token stored."""
    stored = past - store.first
    sealed = min(store.blocks.tokens, stored)
    tail = min(store.tail.tokens, stored - sealed) if store.tail else 0
    packed = sealed + tail
    sinks = 0 if store.sinks.index is None else store.sinks.count
    counts = [blocks.count, sealed, store.first, length - queries, tail, sinks, stored - packed, length - past]
    return [*counts, sealed, packed, stored, rope_state]
