"""The step of attention on a GPU as one operator of torch, `narrowkv::attend_packed`: which kernels it launches, on what.

Shapes of all tensors, and so the grid, follow from capacities; how much of them counts is read on the device, from `lengths`.
So a CUDA graph that has captured the operator may be replayed as long as the store writes into the same memory.
"""

from dataclasses import dataclass, fields, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowkv.attention.triton_blocks import attend_blocks
from narrowkv.attention.triton_forms import Case, Form, power_of_2
from narrowkv.attention.triton_loose import attend_loose, merge
from narrowkv.attention.triton_tail import OUTLIERS, TOKENS, decode_tail, put_outliers
from narrowkv.store import BLOCK

INTERPRETED = bool(triton.knobs.runtime.interpret)
NUMBERS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}  # of exact tokens

# places in `lengths`, int32: columns, sealed tokens that count, first token held, first query, tokens elsewhere, where
# those begin, and outliers of the tail's keys, then of its values
COLUMNS, SEALED, FIRST, ASKING, TAIL, SINKS, WINDOW, NEW, TAIL_START, WINDOW_START, NEW_START, KEY_OUTLIERS, VALUE_OUTLIERS = (
    range(13)
)


@dataclass(frozen=True)
class SideParts:
    """Keys, or values: tables of `tl_tiles`; what the tail holds; exact tokens. None where there is no such thing."""

    table: Tensor | None = None  # [heads, codes, levels, numbers] or [levels] float32
    bytes: Tensor | None = None  # as of `cuda_blocks.Tables`, int32
    scale: Tensor | None = None  # [heads, codes] float32, fixed ones
    zero: Tensor | None = None
    tail: Tensor | None = None  # [batch, heads, 64, codes] uint8, or exact
    tail_scale: Tensor | None = None
    tail_zero: Tensor | None = None
    tail_outliers: Tensor | None = None
    tail_index: Tensor | None = None
    sinks: Tensor | None = None  # [batch, heads, n, head_dim]
    window: Tensor | None = None
    new: Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """What keys and values have in common; shapes as of `attend_blocks`."""

    blocks: Tensor | None = None  # [columns, batch, 2, 8] int64
    starts: Tensor | None = None  # [columns + 1] int32
    bases: Tensor | None = None  # [columns, batch] int32
    near: Tensor | None = None  # [2, pairs, 64] float32
    turns: Tensor | None = None  # [pairs] float64
    kept: Tensor | None = None  # [1 or batch, tokens] int32, or [1 or batch, tokens, 2, pairs]
    padding: Tensor | None = None  # [batch, tokens] uint8
    hidden: Tensor | None = None  # [1 or batch, queries, tokens] uint8
    sink_index: Tensor | None = None  # [batch, sinks] int64
    sink_logits: Tensor | None = None  # [query_heads]


@dataclass(frozen=True)
class Plan:
    """What is known before the numbers are: forms of both sides, the case, how many programs share a sequence's blocks.

    apart: what was read from codes and what was exact are summed apart, for the former's sum is turned yet. rounded: numbers
    are read from codes in 16 bits.
    """

    keys: Form
    values: Form
    case: Case
    splits: int
    apart: bool
    rounded: bool


_PLANS: list[Plan] = []
_NUMBERS: dict[Plan, int] = {}


def number_of(plan: Plan) -> int:
    """The number by which the operator knows a plan."""
    if plan not in _NUMBERS:
        _NUMBERS[plan] = len(_PLANS)
        _PLANS.append(plan)
    return _NUMBERS[plan]


def attend(
    packed_query: Tensor,
    query: Tensor,
    lengths: Tensor,
    parts: tuple[SideParts, SideParts, Shared],
    plan: Plan,
    *numbers: float,
) -> Tensor:
    """[2 if apart else 1, batch, query_heads, queries, head_dim] float32: sums of what was packed and of what was exact.

    packed_query: as codes of keys see it, else as `query`: [batch, query_heads, queries, head_dim]. numbers: scaling, softcap,
    and the factor of the rotary embedding.
    """
    number = number_of(plan)
    found: Tensor = torch.ops.narrowkv.attend_packed(packed_query, query, lengths, tensors_of(parts), number, *numbers)
    return found


def tensors_of(parts: tuple[SideParts, SideParts, Shared]) -> list[Tensor | None]:
    """All of them in one list, as the operator takes them."""
    return [getattr(part, field.name) for part in parts for field in fields(part)]


@torch.library.custom_op("narrowkv::attend_packed", mutates_args=())
def attend_packed(
    packed_query: Tensor,
    query: Tensor,
    lengths: Tensor,
    tensors: list[Tensor | None],
    plan: int,
    scaling: float,
    softcap: float,
    stretch: float,
) -> Tensor:
    """`attend`, its parts in one list."""
    size = len(fields(SideParts))
    sides = SideParts(*tensors[:size]), SideParts(*tensors[size : 2 * size])
    step = _Step(packed_query, query, lengths, sides, Shared(*tensors[2 * size :]), _PLANS[plan], (scaling, softcap, stretch))
    with torch.cuda.device_of(query):
        return step.run()


@attend_packed.register_fake
def _(packed_query, query, lengths, tensors, plan, scaling, softcap, stretch):
    return query.new_empty(1 + _PLANS[plan].apart, *query.shape, dtype=torch.float32)


@dataclass(frozen=True)
class _Step:
    """The launches of one call."""

    packed_query: Tensor
    query: Tensor
    lengths: Tensor
    sides: tuple[SideParts, SideParts]
    shared: Shared
    plan: Plan
    numbers: tuple[float, float, float]

    def run(self) -> Tensor:
        case, (keys, values), shared = self.plan.case, self.sides, self.shared
        batch, query_heads = self.query.shape[:2]
        heads = self.plan.keys.heads
        tail = [self.tail_numbers(form, side, i) for i, (form, side) in enumerate(zip(self._forms, self.sides, strict=True))]
        loose: dict[str, tuple[Tensor | None, Tensor | None, int, int]] = {
            "tail": (tail[0], tail[1], TAIL, TAIL_START),
            "sinks": (keys.sinks, values.sinks, SINKS, SINKS),
            "window": (keys.window, values.window, WINDOW, WINDOW_START),
            "new": (keys.new, values.new, NEW, NEW_START),
        }
        present = [(name, *part) for name, part in loose.items() if part[0] is not None]
        splits = 0 if shared.blocks is None else self.plan.splits
        slots = splits + len(present)
        sums = self.query.new_empty(batch * heads, slots, case.rows, case.dim, dtype=torch.float32)
        peaks = sums.new_empty(batch * heads, slots, case.rows, 2)
        if splits:
            self.launch_blocks(sums, peaks, splits)
        for i, (name, first, second, held, start) in enumerate(present):
            assert first is not None and second is not None
            self.launch_loose(name, first, second, held, start, sums, peaks, splits + i)
        output = sums.new_empty(1 + self.plan.apart, *self.query.shape)
        rows = batch * query_heads * case.queries
        merge[(rows,)](
            sums, peaks, _or(shared.sink_logits, peaks), output, rows, slots, splits + (tail[0] is not None), case.rows,
            case.queries, case.dim, SLOTS=power_of_2(slots), WIDE=case.wide,
            SINKS=0 if shared.sink_logits is None else query_heads, APART=self.plan.apart, num_warps=2 * WARPS,
        )  # fmt: skip
        return output

    @property
    def _forms(self) -> tuple[Form, Form]:
        return self.plan.keys, self.plan.values

    def launch_blocks(self, sums: Tensor, peaks: Tensor, splits: int) -> None:
        shared, lengths = self.shared, self.lengths
        assert shared.blocks is not None
        tables = [_or(part, lengths) for side in self.sides for part in (side.table, side.bytes, side.scale, side.zero)]
        programs = splits * len(sums) * self.chunks
        tiles = sums.new_empty(
            programs * (self.plan.keys.tile + self.plan.values.tile),
            dtype=torch.float16 if self.plan.rounded else torch.float32,
        )
        attend_blocks[(splits, len(sums), self.chunks)](
            self.packed_query, shared.blocks, shared.starts, _or(shared.bases, lengths), lengths, sums, peaks, tiles, *tables,
            _or(shared.near, lengths), _or(shared.turns, lengths), *self.sight, _or(shared.sink_index, lengths),
            shared.blocks.shape[1], sums.shape[1], splits, *self.strides, *self.numbers,
            K=self.plan.keys, V=self.plan.values, C=self.plan.case, NUMBER=tl.float16 if self.plan.rounded else tl.float32,
            num_warps=WARPS, num_stages=stages_of(self.plan.keys, self.plan.values),
        )  # fmt: skip

    def launch_loose(
        self, name: str, keys: Tensor, values: Tensor, held: int, start: int, sums: Tensor, peaks: Tensor, slot: int
    ) -> None:
        case, shared, lengths = self.plan.case, self.shared, self.lengths
        packed, placed = name == "tail", name == "sinks"
        turning = "positions" if case.turning == "near" else case.turning
        if name == "new":
            turning = "none"
        case = replace(case, turning=turning, pairs=case.pairs if turning != "none" else 0, sinks=case.sinks if packed else 0)
        index = _or(shared.sink_index, lengths)
        attend_loose[(len(sums), self.chunks)](
            self.packed_query if packed else self.query, keys, values, index, lengths, sums, peaks,
            _or(shared.turns, lengths), *self.sight, index,
            self.plan.keys.heads, sums.shape[1], slot, held, start, index.shape[-1], keys.stride(1), values.stride(1),
            *self.strides, *self.numbers, PLACED=placed, C=case, NUMBER=NUMBERS[self.query.dtype], num_warps=2 * WARPS,
        )  # fmt: skip

    def tail_numbers(self, form: Form, side: SideParts, which: int) -> Tensor | None:
        """Keys, or values, of the tail [batch, heads, 64, head_dim], not turned."""
        if side.tail is None or form.bits == 16:
            return side.tail
        batch = len(side.tail)
        numbers = self.query.new_empty(batch, form.heads, BLOCK, form.dim, dtype=torch.float32)
        scale, zero = (side.tail_scale, side.tail_zero) if form.ranges == "held" else (side.scale, side.zero)
        decode_tail[(batch * form.heads, BLOCK // TOKENS.value)](
            side.tail, _or(side.table, numbers), _or(scale, numbers), _or(zero, numbers), numbers,
            F=form, WIDE=power_of_2(form.codes),
        )  # fmt: skip
        if side.tail_index is not None and len(side.tail_index):
            grid = (triton.cdiv(len(side.tail_index), OUTLIERS.value),)
            put_outliers[grid](side.tail_index, side.tail_outliers, self.lengths, KEY_OUTLIERS + which, numbers, F=form)
        return numbers

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.plan.case.rows, self.plan.case.room)

    @property
    def sight(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept of tokens, padding, and what is hidden."""
        shared, other = self.shared, self.lengths
        return _or(shared.kept, other), _or(shared.padding, other), _or(shared.hidden, other)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of what is kept, padding and what is hidden, from one sequence to the next; and the sliding window."""
        kept, padding, hidden = self.shared.kept, self.shared.padding, self.shared.hidden
        return (
            0 if kept is None or len(kept) == 1 else kept.stride(0),
            0 if padding is None else padding.stride(0),
            1 if hidden is None else len(hidden),
            0 if hidden is None else hidden.shape[2],
            self.plan.case.window,
        )


WARPS = 4


def stages_of(keys: Form, values: Form) -> int:
    """How many blocks are under way at once.

    Looked-up numbers would lie in shared memory, each once for every stage; and no load may overtake what a block's outliers
    write.
    """
    read_once = all(form.by_bytes or form.shuffled or form.bits == 16 for form in (keys, values))
    return 3 if read_once and not keys.nonzeros + values.nonzeros else 1


def _or(part: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for what is not there and never read."""
    return other if part is None else part
