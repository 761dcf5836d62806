"""The step of attention on a GPU as one operator of torch, `narrowkv::attend_packed`: which kernels it launches, on what.

Shapes of all tensors, and so the grid, follow from capacities; how much of them counts is read on the device, from `lengths`.
So a CUDA graph that has captured the operator may be replayed as long as the store writes into the same memory.
"""

import functools
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowkv.attention.cuda.arguments import PackedTensorArgs, SharedArgs
from narrowkv.attention.cuda.kernels.attend_dense import attend_dense, merge
from narrowkv.attention.cuda.kernels.attend_packed import attend_blocks
from narrowkv.attention.cuda.kernels.attend_streams import Masks, Results, attend_streams, queries_of
from narrowkv.attention.cuda.kernels.dequantize_streams import TOKENS as STREAM_TOKENS
from narrowkv.attention.cuda.kernels.dequantize_streams import TailOutliers, dequantize_stream_tail, pairs_of
from narrowkv.attention.cuda.kernels.dequantize_tail import TOKENS, dequantize_tail
from narrowkv.attention.cuda.kernels.layout import (
    AnyLayout,
    DenseSegments,
    KernelConfig,
    PackedLayout,
    StreamLayout,
    power_of_2,
)
from narrowkv.attention.cuda.kernels.streams import Blocks, codes_of
from narrowkv.store import BLOCK

MOST_CONFIGS = 256  # of which the text is stored
INTERPRETED = bool(triton.knobs.runtime.interpret)
ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}  # of exact tokens

# indices of `lengths`, int32: columns, sealed tokens that count, first token stored, first query, tokens elsewhere, where
# those begin, and what of `rope_state` belongs to the first token stored
COLUMNS, SEALED, FIRST, QUERY, TAIL, SINKS, WINDOW, NEW, TAIL_START, WINDOW_START, NEW_START, ROPE_STATE = range(12)


@dataclass(frozen=True)
class LaunchConfig:
    """What is known before the elements are: forms of both sides, the case, how many programs share a sequence's blocks.

    apart: what was read from codes and what was exact are summed apart, for the former's sum is rotated yet. rounded: elements
    are read from codes in 16 bits.
    """

    keys: AnyLayout
    values: AnyLayout
    case: KernelConfig
    splits: int
    apart: bool
    rounded: bool

    @property
    def streams(self) -> bool:
        """Whether both sides are trellis-coded streams."""
        return isinstance(self.keys, StreamLayout)

    def output_shape(self, query: Tensor) -> tuple[int, ...]:
        """That of the result; of streams with one more element, the part of all weights that what was packed has."""
        return 1 + self.apart, *query.shape[:3], query.shape[3] + self.streams


@functools.lru_cache(MOST_CONFIGS)
def to_text(plan: LaunchConfig) -> str:
    """A plan as an argument of the operator, which tells all of it: no other call needs to have been before."""
    return json.dumps(asdict(plan))


@functools.lru_cache(MOST_CONFIGS)
def from_text(text: str) -> LaunchConfig:
    """Inverse of `to_text`."""
    parts = json.loads(text)
    layouts = {side: _layout(parts[side]) for side in ("keys", "values")}
    return LaunchConfig(**parts | layouts | {"case": KernelConfig(**parts["case"])})


def _layout(parts: dict[str, Any]) -> AnyLayout:
    return StreamLayout(**parts) if "stream_bytes" in parts else PackedLayout(**parts)


def attend(
    packed_query: Tensor,
    query: Tensor,
    lengths: Tensor,
    parts: tuple[PackedTensorArgs, PackedTensorArgs, SharedArgs],
    plan: LaunchConfig,
    *elements: float,
) -> Tensor:
    """[2 if apart else 1, batch, query_heads, queries, head_dim] float32: sums of what was packed and of what was exact; of
    streams as `LaunchConfig.output_shape` has it.

    packed_query: as codes of keys see it, else as `query`: [batch, query_heads, queries, head_dim]. elements: scaling,
    softcap, and the factor of the rotary embedding.
    """
    text = to_text(plan)
    found: Tensor = torch.ops.narrowkv.attend_packed(packed_query, query, lengths, tensors_of(parts), text, *elements)
    return found


def tensors_of(parts: tuple[PackedTensorArgs, PackedTensorArgs, SharedArgs]) -> list[Tensor | None]:
    """All of them in one list, as the operator takes them."""
    return [getattr(part, field.name) for part in parts for field in fields(part)]


@torch.library.custom_op("narrowkv::attend_packed", mutates_args=())
def attend_packed(
    packed_query: Tensor,
    query: Tensor,
    lengths: Tensor,
    tensors: list[Tensor | None],
    plan: str,
    scaling: float,
    softcap: float,
    rope_scale: float,
) -> Tensor:
    """`attend`, its parts in one list, its plan as `to_text` writes it."""
    size = len(fields(PackedTensorArgs))
    sides = PackedTensorArgs(*tensors[:size]), PackedTensorArgs(*tensors[size : 2 * size])
    step = _Launch(
        packed_query, query, lengths, sides, SharedArgs(*tensors[2 * size :]), from_text(plan), (scaling, softcap, rope_scale)
    )
    with torch.cuda.device_of(query):
        return step.run()


@attend_packed.register_fake
def _(packed_query, query, lengths, tensors, plan, scaling, softcap, rope_scale):
    return query.new_empty(from_text(plan).output_shape(query), dtype=torch.float32)


@dataclass(frozen=True)
class _Launch:
    """The launches of one call."""

    packed_query: Tensor
    query: Tensor
    lengths: Tensor
    sides: tuple[PackedTensorArgs, PackedTensorArgs]
    shared: SharedArgs
    plan: LaunchConfig
    elements: tuple[float, float, float]

    def run(self) -> Tensor:
        case, keys, shared = self.plan.case, self.sides[0], self.shared
        batch, query_heads = self.query.shape[:2]
        heads = self.plan.keys.heads
        tail = self.tail_elements()
        parts = {"tail": tail[0], "sinks": keys.sinks, "window": keys.window, "new": keys.new}
        present = [name for name, part in parts.items() if part is not None]
        splits = 0 if shared.blocks is None else self.plan.splits
        slots = splits + len(present)
        sums = self.query.new_empty(batch * heads, slots, case.rows, case.dim, dtype=torch.float32)
        running_max = sums.new_empty(batch * heads, slots, case.rows, 2)
        if splits:
            (self.launch_streams if self.plan.streams else self.launch_packed)(sums, running_max, splits)
        if present:
            self.launch_dense(tail, present, sums, running_max, splits)
        output = sums.new_empty(self.plan.output_shape(self.query))
        rows = batch * query_heads * case.queries
        merge[(rows,)](
            sums, running_max, _or(shared.sink_logits, running_max), output, rows, slots, splits + (tail[0] is not None),
            case.rows,
            case.queries, case.dim, output.shape[-1], SLOTS=power_of_2(slots), WIDE=case.wide,
            SINKS=0 if shared.sink_logits is None else query_heads, APART=self.plan.apart, SHARE=self.plan.streams,
            num_warps=2 * WARPS,
        )  # fmt: skip
        return output

    @property
    def _layouts(self) -> tuple[PackedLayout, PackedLayout]:
        """Those of codes that are not streams."""
        keys, values = self.plan.keys, self.plan.values
        assert isinstance(keys, PackedLayout) and isinstance(values, PackedLayout)
        return keys, values

    def launch_packed(self, sums: Tensor, running_max: Tensor, splits: int) -> None:
        shared, lengths, plan = self.shared, self.lengths, self.plan
        assert shared.blocks is not None
        tables = [_or(part, lengths) for side in self.sides for part in (side.table, side.bytes, side.scale, side.zero)]
        programs = splits * len(sums) * self.chunks
        dtype = torch.float16 if plan.rounded else torch.float32
        tiles = sums.new_empty(programs * (plan.keys.tile + plan.values.tile), dtype=dtype)
        attend_blocks[(splits, len(sums), self.chunks)](
            self.packed_query, shared.blocks, shared.starts, _or(shared.bases, lengths), lengths, sums, running_max, tiles,
            *tables,
            _or(shared.near, lengths), _or(shared.cycles, lengths), *self.mask_args, _or(shared.sink_index, lengths),
            shared.blocks.shape[1], sums.shape[1], splits, *self.strides, *self.elements,
            K=plan.keys, V=plan.values, C=plan.case, ELEMENT=ELEMENTS[dtype],
            num_warps=WARPS if plan.rounded else 2 * WARPS, num_stages=stages_of(*self._layouts, plan.rounded),
        )  # fmt: skip

    def launch_streams(self, sums: Tensor, running_max: Tensor, splits: int) -> None:
        shared, lengths, plan, (keys, values) = self.shared, self.lengths, self.plan, self.sides
        assert shared.blocks is not None
        dtype = torch.float16 if plan.rounded else torch.float32
        programs = splits * len(sums) * self.chunks
        tiles = sums.new_empty(programs * (plan.keys.tile + plan.values.tile), dtype=dtype)
        attend_streams[(splits, len(sums), self.chunks)](
            self.query, Blocks(shared.blocks, shared.starts, _or(shared.bases, lengths)), lengths, Results(sums, running_max),
            tiles,
            codes_of(keys), queries_of(keys), codes_of(values), Masks(*self.mask_args, _or(shared.sink_index, lengths)),
            sums.shape[1], *self.strides[:-1], *self.elements[:2],
            K=plan.keys, V=plan.values, C=plan.case, ELEMENT=ELEMENTS[dtype],
            num_warps=WARPS if plan.rounded else 2 * WARPS, num_stages=1,
        )  # fmt: skip

    def stream_tail_elements(self) -> list[Tensor | None]:
        """Of streams: keys of the tail as channels, not rotated, and values as coefficients in grid steps."""
        (keys, values), (key_layout, value_layout) = self.sides, (self.plan.keys, self.plan.values)
        if keys.tail is None or values.tail is None:
            return [None, None]
        shape = 2, len(keys.tail), key_layout.heads, BLOCK, key_layout.dim
        found = self.query.new_empty(shape, dtype=torch.float32).unbind()
        outliers = (
            TailOutliers(*(_or(part, self.lengths) for part in (side.tail_index, side.tail_outliers, side.tail_count)))
            for side in self.sides
        )
        dequantize_stream_tail[(len(keys.tail) * key_layout.heads, BLOCK // STREAM_TOKENS.value, 2)](
            keys.tail, values.tail, codes_of(keys), codes_of(values), pairs_of(keys), *outliers, *found,
            K=key_layout, V=value_layout, C=self.plan.case, num_warps=WARPS,
        )  # fmt: skip
        return [*found]

    def launch_dense(
        self, tail: list[Tensor | None], present: list[str], sums: Tensor, running_max: Tensor, slot: int
    ) -> None:
        case, shared, lengths, (keys, values) = self.plan.case, self.shared, self.lengths, self.sides
        new = replace(case, rope_mode="none", pairs=0, sinks=0)
        tail_case = replace(case, rope_mode="positions" if case.rope_mode == "near" else case.rope_mode)
        parts = [(tail[0], tail[1]), (keys.sinks, values.sinks), (keys.window, values.window), (keys.new, values.new)]
        strides = [
            0 if part is None else part.stride(1)
            for part in (tail[0], keys.sinks, keys.window, values.window, keys.new, values.new)
        ]
        index = _or(shared.sink_index, lengths)
        attend_dense[(len(sums), self.chunks, len(present))](
            self.packed_query, self.query, *(_or(part, lengths) for pair in parts for part in pair), lengths, sums,
            running_max,
            _or(shared.cycles, lengths), *self.mask_args, index,
            self.plan.keys.heads, sums.shape[1], slot, index.shape[-1], *self.strides, *strides, *self.elements,
            L=DenseSegments(*(present.index(name) if name in present else -1 for name in ("tail", "sinks", "window", "new"))),
            TAIL=tail_case, OLD=replace(tail_case, sinks=0), NEW=new, ELEMENT=ELEMENTS[self.query.dtype],
            num_warps=2 * WARPS, num_stages=1,
        )  # fmt: skip

    def tail_elements(self) -> list[Tensor | None]:
        """Keys and values of the tail [batch, heads, 64, head_dim], not rotated; those that are exact as they lie."""
        if self.plan.streams:
            return self.stream_tail_elements()
        found: list[Tensor | None] = [side.tail for side in self.sides]
        tail = found[0]
        coded = [layout.bits < 16 for layout in self._layouts]
        if tail is None or not any(coded):
            return found
        arguments: list[Tensor] = []
        for i, (layout, side) in enumerate(zip(self._layouts, self.sides, strict=True)):
            if coded[i]:
                found[i] = self.query.new_empty(len(tail), layout.heads, BLOCK, layout.dim, dtype=torch.float32)
            scale, zero = (side.tail_scale, side.tail_zero) if layout.ranges == "stored" else (side.scale, side.zero)
            lists = (side.tail, side.table, scale, zero, side.tail_index, side.tail_outliers, side.tail_count, found[i])
            arguments += [_or(part, self.lengths) for part in lists]
        keys, values = self._layouts
        dequantize_tail[(len(tail) * keys.heads, BLOCK // TOKENS.value, 2)](*arguments, K=keys, V=values)
        return found

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.plan.case.rows, self.plan.case.capacity)

    @property
    def mask_args(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored of tokens, padding, and what is hidden."""
        shared, other = self.shared, self.lengths
        return _or(shared.rope_state, other), _or(shared.padding, other), _or(shared.hidden, other)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of what is stored, padding and what is hidden, from one sequence to the next; and the sliding window."""
        rope_state, padding, hidden = self.shared.rope_state, self.shared.padding, self.shared.hidden
        return (
            0 if rope_state is None or len(rope_state) == 1 else rope_state.stride(0),
            0 if padding is None else padding.stride(0),
            1 if hidden is None else len(hidden),
            0 if hidden is None else hidden.shape[2],
            self.plan.case.window,
        )


WARPS = 4


def stages_of(keys: PackedLayout, values: PackedLayout, rounded: bool) -> int:
    """How many blocks are under way at once. rounded: whether elements are read in 16 bits, else each is loaded.

    Loaded elements would lie in shared memory, each once for every stage; and no load may overtake what a block's outliers
    write.
    """
    read_once = all(layout.by_bytes or layout.bits == 16 for layout in (keys, values))
    return 3 if rounded and read_once and not keys.nonzeros + values.nonzeros else 1


def _or(part: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for what is not there and never read."""
    return other if part is None else part
