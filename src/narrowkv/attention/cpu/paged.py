"""Attention of the new tokens of a step over pages of an engine's memory: compiled for a few queries of a sequence, which are
read in place, all sequences in one call; in plain torch for prompts.

What new tokens see of each other is exact unless they are read in pages too, as the first token of a sequence is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.attention import tiled
from narrowkv.attention.cpu.decode import fastest_kernel, split_length
from narrowkv.attention.cpu.int16 import STREAM_KERNELS
from narrowkv.attention.cpu.streams import StreamValues, key_streams
from narrowkv.attention.cpu.tables import NOTHING_ROTATES, rotation_to
from narrowkv.attention.inputs import AttentionInputs
from narrowkv.attention.mask import AttentionMask
from narrowkv.attention.rope import Rope
from narrowkv.codec import TrellisQuantizer
from narrowkv.codec.frames import FRAME
from narrowkv.codec.memory import address
from narrowkv.store import BLOCK
from narrowkv.store.paged import PagedLayer, PagedSequence, place
from narrowkv.store.plans import Plans

NOTHING = [0] * 6  # of a tail


class StepSequence(NamedTuple):
    """One sequence of a step: its new tokens, from `start` to before `stop` of all, and its length with them."""

    start: int
    stop: int
    length: int


class StepView:
    """What the new tokens of a step see of their sequences, in all layers of one sliding window; found once.

    tables: pages of each sequence, [sequences, pages] int64. in_pages: whether new tokens are read there too. few: sequences
    that the kernel attends to; farthest: how far it reads. place, table_address: where these and tables lie, for the kernel.
    """

    def __init__(
        self,
        sequences: Sequence[StepSequence],
        tables: Tensor,
        kv_heads: int,
        window: int | None = None,
        in_pages: bool = False,
    ):
        self.sequences, self.tables, self.kv_heads = sequences, tables.contiguous(), kv_heads
        self.mask, self.in_pages = AttentionMask(sliding_window=window), in_pages
        self.few = [i for i, one in enumerate(sequences) if self._suits_the_kernel(i, one)]
        self.many = sorted({*range(len(sequences))} - {*self.few})
        self.farthest = max((self.past(i) for i in self.few), default=0)
        self._hidden = [self._hidden_from(i) for i in self.few]
        rows = [self._row(i, hidden) for i, hidden in zip(self.few, self._hidden, strict=True)]
        self._rows = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.counting = counting_to(self.farthest)
        self.place = (self._rows.data_ptr(), len(self.few))
        self.table_address = (address(self.tables, torch.int64), *self.tables.shape)

    def _suits_the_kernel(self, i: int, one: StepSequence) -> bool:
        return one.stop - one.start <= tiled.FEW_QUERIES and self.past(i) > self.first(i)

    def past(self, i: int) -> int:
        """How far a sequence is read in pages."""
        start, stop, length = self.sequences[i]
        return length if self.in_pages else length - (stop - start)

    def first(self, i: int) -> int:
        """The token from which on a sequence is read, which begins a block."""
        if self.mask.sliding_window is None:
            return 0
        start, stop, length = self.sequences[i]
        return max(length - (stop - start) + 1 - self.mask.sliding_window, 0) // BLOCK * BLOCK

    def _hidden_from(self, i: int) -> Tensor | None:
        """What each query does not see: [queries, tokens in blocks, then exact ones] bool; None where all see everything."""
        start, stop, length = self.sequences[i]
        first, past = self.first(i), self.past(i)
        if stop - start == 1 and self.mask.sliding_window is None:
            return None
        index = torch.arange(first, length, dtype=torch.int64, device="cpu")
        hidden = self.mask.hidden(index[len(index) - (stop - start) :], index)[0, 0]
        packed, sink = past - first, 1 if first == 0 else 0
        return torch.cat([hidden[:, :packed], hidden[:, :sink], hidden[:, packed:]], dim=1).contiguous()

    def _row(self, i: int, hidden: Tensor | None) -> list[int]:
        """As the kernel takes it."""
        one, first, past = self.sequences[i], self.first(i), self.past(i)
        chunk = split_length((-(-past // BLOCK) - first // BLOCK) * self.kv_heads)
        return [i, one.start, one.stop - one.start, first, past, chunk, address(hidden, torch.bool)]


@dataclass(frozen=True)
class LayerTables:
    """What the kernel needs of a layer besides its pages. kernels: those in int16 that read it, fastest first. used: what
    `sides` point into.
    """

    sides: tuple[_kernels.PackedTensor, _kernels.PackedTensor]
    values: StreamValues
    kernels: list[str]
    used: list[Tensor]

    @classmethod
    def of(cls, quantizers: tuple[TrellisQuantizer, TrellisQuantizer], rope: Rope | None) -> "LayerTables":
        """rope: of keys that are stored before it."""
        assert quantizers[0].mean is not None
        of_keys, used = key_streams(quantizers[0], rope)
        values, head_dim = StreamValues.of(quantizers[1]), quantizers[0].mean.shape[1]
        sides = (_side(head_dim, of_keys), _side(head_dim, values.streams))
        return cls(sides, values, STREAM_KERNELS if all(side.uses_int16 for side in sides) else [], used)

    def kernel(self, dtype: torch.dtype) -> str:
        """The kernel for queries of a dtype."""
        return fastest_kernel(dtype, self.kernels)


class PagedAttention:
    """Attention of one layer over its pages.

    query_heads: of the model. scaling, softcap, sink_logits: as `AttentionInputs` has them.
    """

    def __init__(
        self,
        layer: PagedLayer,
        query_heads: int,
        scaling: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ):
        rope = layer.rope
        assert rope is None or isinstance(rope, Rope)
        self.layer, self.rope, self.query_heads, self.scaling, self.softcap = layer, rope, query_heads, scaling, softcap
        self._sink_logits = None if sink_logits is None else sink_logits.float().contiguous()
        self.tables = LayerTables.of(layer.quantizers, rope)
        self._problem: tuple[_kernels.Rotation, _kernels.Problem] | None = None

    def attend(
        self,
        view: StepView,
        query: Tensor,
        new: tuple[Tensor, Tensor],
        output: Tensor,
        kernel: str | None = None,
    ) -> None:
        """Attend to what each sequence has, and write it to `output`, which is like query [tokens, query_heads, head_dim].

        new: keys, rotated, and values [tokens, kv_heads, head_dim]. kernel: by default that of `LayerTables.kernel`. More than
        16 queries of a sequence (so prompts are read), and those that nothing precedes, go to `tiled.attend`.
        """
        if view.few:
            self._attend_few(view, query, new, output, kernel or self.tables.kernel(query.dtype))
        for i in view.many:
            start, stop, _ = view.sequences[i]
            inputs, sequence = self.inputs(view, i, query, new)
            output[start:stop] = tiled.attend(inputs, sequence)[0].transpose(0, 1)

    def inputs(
        self, view: StepView, i: int, query: Tensor, new: tuple[Tensor, Tensor]
    ) -> tuple[AttentionInputs, PagedSequence]:
        """What a sequence attends to, as all backends take it."""
        start, stop, _ = view.sequences[i]
        first, past = view.first(i), view.past(i)
        own_query, *own = (part[start:stop].transpose(0, 1)[None] for part in (query, *new))
        inputs = AttentionInputs(
            query=own_query,
            past=past,
            new=None if view.in_pages else (own[0], own[1]),
            rope=self.rope,
            rope_state=None if self.rope is None else counting_to(past).positions[None, first:past],
            mask=view.mask,
            scaling=self.scaling,
            softcap=self.softcap,
            sink_logits=self._sink_logits,
        )
        return inputs, PagedSequence(self.layer, view.tables[i], first)

    def _attend_few(self, view: StepView, query: Tensor, new: tuple[Tensor, Tensor], output: Tensor, kernel: str) -> None:
        self.layer.compiled.attend(
            kernel,
            torch.get_num_threads(),
            self._problem_to(view.farthest),
            view.place,
            view.table_address,
            view.counting.place,
            len(query),
            view.in_pages,
            place(query),
            place(output),
            place(new[0]),
            place(new[1]),
        )

    def _problem_to(self, past: int) -> _kernels.Problem:
        """What all sequences of up to this many tokens have in common; made again only where tables of angles grow."""
        rotation = NOTHING_ROTATES.rotation if self.rope is None else rotation_to(self.rope, past - 1 + FRAME)
        if self._problem is None or self._problem[0] is not rotation:
            self._problem = rotation, self._made(rotation)
        return self._problem[1]

    def _made(self, rotation: _kernels.Rotation) -> _kernels.Problem:
        layout, matrix = self.layer.layout, self.tables.values.matrix
        return _kernels.Problem(
            keys=self.tables.sides[0],
            values=self.tables.sides[1],
            rotation=rotation,
            chunk=0,
            shape=[1, self.query_heads, layout.kv_heads, 0, layout.head_dim],
            blocks=0,
            tokens=0,
            tail=0,
            stored=0,
            output=0,
            packed_query=0,
            exact_query=0,
            exact=[],
            keys_tail=NOTHING,
            values_tail=NOTHING,
            positions=0,
            position_stride=0,
            angles=0,
            table=0,
            starts=0,
            hidden=0,
            hidden_batch=0,
            sink_index=0,
            sinks=0,
            sink_logits=address(self._sink_logits, torch.float32, shape=[self.query_heads]),
            key_offsets=0,
            value_bias=0,
            value_matrix=address(matrix.matrix, torch.float32),
            value_mean=address(matrix.mean, torch.float32),
            value_rows=matrix.rows,
            scaling=self.scaling,
            softcap=self.softcap or 0.0,
        )


def _side(head_dim: int, streams: _kernels.Streams) -> _kernels.PackedTensor:
    return _kernels.PackedTensor(
        bits=8,
        codes=head_dim,
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


@dataclass(frozen=True)
class Counting:
    """Rows that all sequences share, [n] each. positions: int32, from 0 on. starts: int64, the first token of each block."""

    positions: Tensor
    starts: Tensor

    @property
    def place(self) -> tuple[int, int, int]:
        """Where they lie, and how many tokens they count."""
        return self.positions.data_ptr(), self.starts.data_ptr(), len(self.positions)

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [self.positions, self.starts]


_plans = Plans()


def counting_to(tokens: int) -> Counting:
    """For sequences of up to this many tokens."""
    known = _plans.get(Counting)
    if known is None or tokens > len(known.positions):
        every = torch.arange(2 * tokens, dtype=torch.int32, device="cpu")
        starts = torch.arange(2 * tokens // BLOCK + 2, dtype=torch.int64, device="cpu") * BLOCK
        known = _plans.put(Counting(every, starts))
    return known
