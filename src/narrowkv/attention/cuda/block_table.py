"""What kernels on a GPU are given of a store: forms of its sides, tables, and where its blocks lie, stored from call to
call.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowkv.attention.cuda.codebooks import CodebookSet, codebooks_of, folds
from narrowkv.attention.cuda.kernels.layout import AnyLayout, PackedLayout, StreamLayout, power_of_2
from narrowkv.attention.head_transform import head_rotation
from narrowkv.attention.inputs import AttentionInputs
from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.codec import AnyQuantizer, TrellisQuantizer
from narrowkv.codec.packing import PLANES
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import BLOCK, LayerStore, addresses
from narrowkv.store.page import BlockTableEntry, is_channel_major

KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
GROWTH, LEAST_GROWTH = 8, 16  # columns find space for one more eighth, or this many more
FEWEST_NONZEROS, MOST_NONZEROS = 128, 512


@dataclass(frozen=True)
class NearAngles:
    """What kernels rotate keys by within a block.

    near: cosines and sines of the positions 0 to 63, [2, pairs, 64] float32. cycles: frequencies in cycles, [pairs] float64.
    """

    near: Tensor
    cycles: Tensor

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [self.near, self.cycles]


@dataclass
class BlockTable:
    """A store's sides and sealed blocks. Memory of a given capacity stays where it is while columns come.

    table: [capacity, batch, 2, 8] int64; starts: [capacity + 1] int32; bases: [capacity, batch] int32 position of each block's
    first token, if the others follow it. ends: serial elements of the first and last of `sure` columns, which tell whether it
    is still them.
    """

    layouts: tuple[AnyLayout, AnyLayout]
    tables: tuple[CodebookSet, CodebookSet]
    head_rotations: tuple[Tensor | None, Tensor | None]
    rotated: tuple[bool, bool]  # whether queries are rotated before, sums after
    table: Tensor
    starts: Tensor
    bases: Tensor
    near: Tensor | None
    cycles: Tensor | None
    rope_mode: str
    ends: tuple[int, int] = (-1, -1)
    count: int = 0
    sure: int = 0  # of them, those of which the position of every token was known

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        tables = [part for tables in self.tables for part in (tables.table, tables.bytes, tables.scale, tables.zero)]
        parts = (self.table, self.starts, self.bases, self.near, self.cycles, *self.head_rotations, *tables)
        return [part for part in parts if part is not None]

    @property
    def capacity(self) -> int:
        return len(self.table)

    @property
    def pairs(self) -> int:
        """Pairs of channels that rotate, where positions tell how far."""
        return 0 if self.cycles is None else len(self.cycles)

    def rope_config(self, inputs: AttentionInputs) -> dict[str, Any]:
        """Channels of keys, and which of them rotate how, as `KernelConfig` names them."""
        rope, rope_state = inputs.rope, inputs.rope_state
        return {
            "dim": inputs.query.shape[3],
            "pairs": 0 if rope is None or rope_state is None else self.pairs or rope_state.shape[-1],
            "interleaved": rope is not None and rope_state is not None and rope.interleaved,
            "rope_mode": self.rope_mode,
        }

    def shared(self) -> dict[str, Tensor | None]:
        """Its tensors, as `arguments.SharedArgs` names them."""
        some = self.count > 0
        return {
            "blocks": self.table if some else None,
            "starts": self.starts,
            "bases": self.bases,
            "near": self.near,
            "cycles": self.cycles,
        }


def kernel_rope_state(rope: AnyRope | None, rope_state: Tensor | None) -> Tensor | None:
    """What is stored of each token, as kernels read it: positions [1 or batch, tokens] int32, or angles of a token
    together.
    """
    if rope is None or rope_state is None:
        return None
    if rope_state.stride(0) == 0:
        rope_state = rope_state[:1]
    if isinstance(rope, Rope):
        rope_state = rope_state if rope_state.dtype == torch.int32 else rope_state.to(torch.int32)
    return rope_state if rope_state[0].is_contiguous() else rope_state.contiguous()


def block_table_of(store: LayerStore, rope: AnyRope | None, rope_state: Tensor | None, padding: Tensor | None) -> BlockTable:
    """The store's blocks; only new columns are looked at, unless the first are others than before.

    rope_state: of `rope`, by which stored keys are rotated. padding: [batch, tokens] bool, False where hidden.
    """
    known, columns = store.plans.get(BlockTable), store.blocks.columns
    assert store.shape is not None
    if known is None or (known.rope_mode == "none") != (rope_state is None) or known.table.shape[1] != store.shape[0]:
        known = store.plans.put(_made(store, rope, rope_state))
    elif known.sure > len(columns) or known.ends != _ends(columns[: known.sure]):  # others, in the same memory
        known.ends, known.sure, known.rope_mode = (-1, -1), 0, _rope_mode(known.cycles, rope_state)
    known.count = known.sure
    if known.count < len(columns):
        _add(known, store, rope_state, padding)
    return known


def _ends(columns: list[BlockTableEntry]) -> tuple[int, int]:
    """What tells runs of columns apart: a column that has changed has a new number, and none is changed between others."""
    return (columns[0].serial, columns[-1].serial) if columns else (-1, -1)


def _made(store: LayerStore, rope: AnyRope | None, rope_state: Tensor | None) -> BlockTable:
    """Without a column yet."""
    assert store.shape is not None
    batch, heads, dim = store.shape
    device = _device(store)
    kinds = _kind(store, 0), _kind(store, 1)
    angles = _angles(rope) if isinstance(rope, Rope) and rope_state is not None else None
    cycles = None if angles is None else angles.cycles
    head_rotations = [head_rotation(quantizer) for quantizer in store.quantizers]
    rotated = [
        quantizer.scheme.transform.hadamard or matrix is not None or isinstance(quantizer, TrellisQuantizer)
        for quantizer, matrix in zip(store.quantizers, head_rotations, strict=True)
    ]
    return BlockTable(
        layouts=layouts_of(store.quantizers, heads, dim, kinds),
        tables=(codebooks_of(store.quantizers[0], True), codebooks_of(store.quantizers[1], False)),
        head_rotations=(head_rotations[0], head_rotations[1]),
        rotated=(rotated[0], rotated[1]),
        table=torch.zeros(0, batch, 2, 8, dtype=torch.int64, device=device),
        starts=torch.zeros(1, dtype=torch.int32, device=device),
        bases=torch.zeros(0, batch, dtype=torch.int32, device=device),
        near=None if angles is None else angles.near,
        cycles=cycles,
        rope_mode=_rope_mode(cycles, rope_state),
    )


def _rope_mode(cycles: Tensor | None, rope_state: Tensor | None) -> str:
    """How keys are rotated as far as is known before any is looked at."""
    return "none" if rope_state is None else "near" if cycles is not None else "given"


def tables_for(store: LayerStore) -> list[Tensor]:
    """What is allocated for kernels to find the blocks of a store."""
    known = store.plans.get(BlockTable)
    return [] if known is None else [known.table, known.starts, known.bases]


def _add(known: BlockTable, store: LayerStore, rope_state: Tensor | None, padding: Tensor | None) -> None:
    """Enter the columns that are not yet there, but for those after the last token of which something is stored."""
    new = store.blocks.columns[known.count :]
    counts = torch.tensor([column.count for column in new], dtype=torch.int64, device="cpu")
    ends = counts.cumsum(0) + (int(known.starts[known.count]) if known.count else 0)
    if rope_state is not None:
        reached = int((ends - counts < rope_state.shape[1]).sum())
        new, counts, ends = new[:reached], counts[:reached], ends[:reached]
    if not new:
        return
    if isinstance(known.layouts[0], StreamLayout):
        _require_streams(known.layouts, new)
    first, count = known.count, known.count + len(new)
    if count > known.capacity:
        more = count + max(count // GROWTH, LEAST_GROWTH) - known.capacity
        known.table, known.starts, known.bases = (
            torch.cat([part, part.new_zeros(more, *part.shape[1:])]) for part in (known.table, known.starts, known.bases)
        )
    known.table[first:count] = addresses(new).to(known.table.device)
    known.starts[first + 1 : count + 1] = ends.to(known.starts.device)
    if known.rope_mode == "near" and rope_state is not None:
        known.bases[first:count], follow = _bases(rope_state, padding, store.first, (ends - counts).tolist(), ends.tolist())
        known.rope_mode = "near" if follow else "positions"
    known.count = count
    known.sure = count if rope_state is None else first + int((ends <= rope_state.shape[1]).sum())
    known.ends = _ends(store.blocks.columns[: known.sure])


def _require_streams(layouts: tuple[AnyLayout, ...], columns: list[BlockTableEntry]) -> None:
    """Raise UnsupportedModelError where blocks hold streams of other lengths than their quantizers have."""
    for page in {id(column.page): column.page for column in columns}.values():
        for layout, side in zip(layouts, (page.keys, page.values), strict=True):
            if side.planes[0].shape[2] != layout.rows:
                raise UnsupportedModelError(
                    f"Blocks of trellis-coded streams have {side.planes[0].shape[2]} bytes for a token, not the {layout.rows} "
                    "of their rates; load the calibration that encoded them."
                )


def _bases(rope_state: Tensor, padding: Tensor | None, first: int, starts: list[int], ends: list[int]) -> tuple[Tensor, bool]:
    """Positions of blocks' first tokens, [blocks, 1 or batch], counted back from their last, before which there may be
    padding; and whether those of all tokens that are seen follow each other.
    """
    ends = [min(end, rope_state.shape[1]) for end in ends]
    begin, lengths = (
        torch.tensor(starts, device=rope_state.device, dtype=torch.int64),
        torch.tensor(ends, device=rope_state.device, dtype=torch.int64),
    )
    bases = rope_state[:, lengths - 1] - (lengths - 1 - begin)
    block = torch.repeat_interleave(lengths - begin)
    tokens = torch.arange(starts[0], ends[-1], device=rope_state.device, dtype=torch.int64)
    strange = rope_state[:, starts[0] : ends[-1]] != bases[:, block] + tokens - begin[block]
    if padding is not None:
        strange = strange & padding[:, first + starts[0] : first + ends[-1]]
    return bases.T, not bool(strange.any())


def _device(store: LayerStore) -> torch.device:
    return store.tensors()[0].device


def _ordered(quantizer: AnyQuantizer, keys: bool) -> bool:
    """Whether columns of its tiles are tokens, which then lie in the order of its planes."""
    return quantizer.scheme.bits != 16 and is_channel_major(quantizer.scheme, keys)


def layouts_of(
    quantizers: tuple[AnyQuantizer, AnyQuantizer], heads: int, dim: int, kinds: tuple[str, str]
) -> tuple[AnyLayout, AnyLayout]:
    """The forms of keys and values. kinds: of exact elements."""
    if isinstance(quantizers[0], TrellisQuantizer):
        keys, values = (_stream_layout(*side, heads, dim) for side in zip(quantizers, kinds, strict=True))
        return keys, values
    sides = list(zip(quantizers, (True, False), kinds, strict=True))
    planes = [PLANES[quantizer.scheme.code_bits][0] for quantizer, keys, _ in sides if _ordered(quantizer, keys)]
    order = max(planes, default=8)  # one for both, where their columns are tokens
    first, second = (_layout(quantizer, keys, heads, dim, order, kind) for quantizer, keys, kind in sides)
    return first, second


def _layout(quantizer: AnyQuantizer, keys: bool, heads: int, dim: int, order: int, kind: str) -> PackedLayout:
    scheme = quantizer.scheme
    channel_major = is_channel_major(scheme, keys)
    exact = scheme.bits == 16
    wide = 4
    if not channel_major:
        order = 8 if exact else PLANES[scheme.code_bits][0]
        planes = (8,) if exact else PLANES[scheme.code_bits]
        wide = 4 if all(dim * plane % 32 == 0 for plane in planes) and not exact else 1
    layouts = scheme.range_forms(heads, BLOCK, dim)
    own = folds(quantizer, channel_major)
    shape, ranges = (1, 1, 1), "none"
    if layouts:
        shape, ranges = layouts["scale"][0], "stored"
    elif scheme.static and not own:
        shape, ranges = (heads, 1, dim), "fixed"
    return PackedLayout(
        bits=16 if exact else scheme.code_bits,
        dim=dim,
        heads=heads,
        channel_major=channel_major,
        order=order,
        wide=wide,
        own=own,
        even=scheme.datatype == "int" and scheme.bits == 8,
        ranges=ranges,
        range_heads=shape[0],
        range_tokens=shape[1],
        range_channels=shape[2],
        zero=not scheme.symmetric,
        nonzeros=_nonzeros(scheme.outliers.fraction * BLOCK * dim),
        kind=kind,
    )


def _stream_layout(quantizer: AnyQuantizer, kind: str, heads: int, dim: int) -> StreamLayout:
    scheme = quantizer.scheme
    codes = scheme.outlier_positions(dim)
    return StreamLayout(
        codes=codes,
        dim=dim,
        heads=heads,
        stream_bytes=scheme.codes(dim),
        norms=scheme.quantization.token_norm,
        nonzeros=_nonzeros(scheme.outliers.fraction * BLOCK * codes),
        kind=kind,
    )


def _nonzeros(expected: float) -> int:
    """Outliers that are taken at once where this many are expected in a block."""
    return min(max(power_of_2(int(1.25 * expected)), FEWEST_NONZEROS), MOST_NONZEROS) if expected else 0


def _kind(store: LayerStore, side: int) -> str:
    """Of exact elements: all of them, or outliers. Raises UnsupportedModelError where kernels do not read it."""
    exact = store.quantizers[side].scheme.bits == 16
    if store.tail:
        capacity = store.tail.buffers[side]
        found = capacity.codes if exact else capacity.outlier_values
    else:
        page = store.blocks.columns[0].page if store.blocks.columns else None
        packed = None if page is None else (page.keys, page.values)[side]
        found = None if packed is None else packed.planes[0] if exact else packed.outlier_values
    dtype = torch.float16 if found is None else found.dtype
    if dtype not in KINDS:
        raise UnsupportedModelError(f"Backend cuda does not read elements stored in {dtype}; choose backend torch.")
    return KINDS[dtype]


def _angles(rope: Rope) -> NearAngles:
    """Made once for all layers that share the embedding."""
    frequencies = rope.inverse_frequencies
    known = rope.plans.get(NearAngles)
    if known is None:
        angles = frequencies.double()[:, None] * torch.arange(BLOCK, device=frequencies.device, dtype=torch.int64)
        near = torch.stack([angles.cos(), angles.sin()]).float().contiguous()
        known = rope.plans.put(NearAngles(near, frequencies.double() / (2 * torch.pi)))
    return known
