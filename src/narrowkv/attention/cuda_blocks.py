"""What kernels on a GPU are told of a store: forms of its sides, tables, and where its blocks lie, kept from call to call."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from narrowkv.attention.cuda_tables import Tables, folds, tables_of
from narrowkv.attention.reading import matrix_of
from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.attention.triton_forms import Form, power_of_2
from narrowkv.codec import AnyQuantizer
from narrowkv.codec.packing import PLANES
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import BLOCK, LayerStore, addresses
from narrowkv.store.page import Column, is_channel_major

KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
GROWTH, LEAST_GROWTH = 8, 16  # columns find room for one more eighth, or so many more
FEWEST_NONZEROS, MOST_NONZEROS = 128, 512

_KNOWN: WeakKeyDictionary[LayerStore, "Blocks"] = WeakKeyDictionary()
_ANGLES = WeakIdKeyDictionary()  # by a rope's frequencies: what `angles` reads


@dataclass
class Blocks:
    """A store's sides and sealed blocks. Memory of a given room stays where it is while columns come.

    table: [room, batch, 2, 8] int64; starts: [room + 1] int32; bases: [room, batch] int32 position of each block's first
    token, if the others follow it. ends: serial numbers of the first and last of `sure` columns, which tell whether it is
    still them.
    """

    forms: tuple[Form, Form]
    tables: tuple[Tables, Tables]
    matrices: tuple[Tensor | None, Tensor | None]
    turned: tuple[bool, bool]  # whether queries are turned before, sums after
    table: Tensor
    starts: Tensor
    bases: Tensor
    near: Tensor | None
    turns: Tensor | None
    turning: str
    ends: tuple[int, int] = (-1, -1)
    count: int = 0
    sure: int = 0  # of them, those of which the position of every token was known

    @property
    def room(self) -> int:
        return len(self.table)

    @property
    def pairs(self) -> int:
        """Pairs of channels that turn, where positions tell how far."""
        return 0 if self.turns is None else len(self.turns)

    def shared(self) -> dict[str, Tensor | None]:
        """Its tensors, as `triton_launch.Shared` names them."""
        some = self.count > 0
        return {
            "blocks": self.table if some else None,
            "starts": self.starts,
            "bases": self.bases,
            "near": self.near,
            "turns": self.turns,
        }


def blocks_of(store: LayerStore, rope: AnyRope | None, kept: Tensor | None, padding: Tensor | None) -> Blocks:
    """The store's blocks; only new columns are looked at, unless the first are others than before.

    kept: of `rope`, by which stored keys are turned. padding: [batch, tokens] bool, False where hidden.
    """
    known, columns = _KNOWN.get(store), store.blocks.columns
    assert store.shape is not None
    if known is None or (known.turning == "none") != (kept is None) or known.table.shape[1] != store.shape[0]:
        known = _KNOWN[store] = _made(store, rope, kept)
    elif known.sure > len(columns) or known.ends != _ends(columns[: known.sure]):  # others, in the same memory
        known.ends, known.sure, known.turning = (-1, -1), 0, _turning(known.turns, kept)
    known.count = known.sure
    if known.count < len(columns):
        _add(known, store, kept, padding)
    return known


def _ends(columns: list[Column]) -> tuple[int, int]:
    """What tells runs of columns apart: a column that has changed has a new number, and none is changed between others."""
    return (columns[0].serial, columns[-1].serial) if columns else (-1, -1)


def _made(store: LayerStore, rope: AnyRope | None, kept: Tensor | None) -> Blocks:
    """Without a column yet."""
    assert store.shape is not None
    batch, heads, dim = store.shape
    device = _device(store)
    kinds = _kind(store, 0), _kind(store, 1)
    near, turns = _angles(rope) if isinstance(rope, Rope) and kept is not None else (None, None)
    matrices = [matrix_of(quantizer) for quantizer in store.quantizers]
    turned = [
        quantizer.scheme.hadamard or matrix is not None for quantizer, matrix in zip(store.quantizers, matrices, strict=True)
    ]
    return Blocks(
        forms=forms_of(store.quantizers, heads, dim, kinds),
        tables=(tables_of(store.quantizers[0], True), tables_of(store.quantizers[1], False)),
        matrices=(matrices[0], matrices[1]),
        turned=(turned[0], turned[1]),
        table=torch.zeros(0, batch, 2, 8, dtype=torch.int64, device=device),
        starts=torch.zeros(1, dtype=torch.int32, device=device),
        bases=torch.zeros(0, batch, dtype=torch.int32, device=device),
        near=near,
        turns=turns,
        turning=_turning(turns, kept),
    )


def _turning(turns: Tensor | None, kept: Tensor | None) -> str:
    """How keys are turned as far as is known before any is looked at."""
    return "none" if kept is None else "near" if turns is not None else "given"


def tables_for(store: LayerStore) -> list[Tensor]:
    """What is allocated for kernels to find the blocks of a store."""
    known = _KNOWN.get(store)
    return [] if known is None else [known.table, known.starts, known.bases]


def _add(known: Blocks, store: LayerStore, kept: Tensor | None, padding: Tensor | None) -> None:
    """Enter the columns that are not yet there, but for those after the last token of which something is kept."""
    new = store.blocks.columns[known.count :]
    counts = torch.tensor([column.count for column in new], dtype=torch.int64, device="cpu")
    ends = counts.cumsum(0) + (int(known.starts[known.count]) if known.count else 0)
    if kept is not None:
        reached = int((ends - counts < kept.shape[1]).sum())
        new, counts, ends = new[:reached], counts[:reached], ends[:reached]
    if not new:
        return
    first, count = known.count, known.count + len(new)
    if count > known.room:
        more = count + max(count // GROWTH, LEAST_GROWTH) - known.room
        known.table, known.starts, known.bases = (
            torch.cat([part, part.new_zeros(more, *part.shape[1:])]) for part in (known.table, known.starts, known.bases)
        )
    known.table[first:count] = addresses(new).to(known.table.device)
    known.starts[first + 1 : count + 1] = ends.to(known.starts.device)
    if known.turning == "near" and kept is not None:
        known.bases[first:count], follow = _bases(kept, padding, store.first, (ends - counts).tolist(), ends.tolist())
        known.turning = "near" if follow else "positions"
    known.count = count
    known.sure = count if kept is None else first + int((ends <= kept.shape[1]).sum())
    known.ends = _ends(store.blocks.columns[: known.sure])


def _bases(kept: Tensor, padding: Tensor | None, first: int, starts: list[int], ends: list[int]) -> tuple[Tensor, bool]:
    """Positions of blocks' first tokens, [blocks, 1 or batch], counted back from their last, before which there may be
    padding; and whether those of all tokens that are seen follow each other.
    """
    ends = [min(end, kept.shape[1]) for end in ends]
    begin, lengths = (
        torch.tensor(starts, device=kept.device, dtype=torch.int64),
        torch.tensor(ends, device=kept.device, dtype=torch.int64),
    )
    bases = kept[:, lengths - 1] - (lengths - 1 - begin)
    block = torch.repeat_interleave(lengths - begin)
    tokens = torch.arange(starts[0], ends[-1], device=kept.device, dtype=torch.int64)
    strange = kept[:, starts[0] : ends[-1]] != bases[:, block] + tokens - begin[block]
    if padding is not None:
        strange = strange & padding[:, first + starts[0] : first + ends[-1]]
    return bases.T, not bool(strange.any())


def _device(store: LayerStore) -> torch.device:
    return store.tensors()[0].device


def _ordered(quantizer: AnyQuantizer, keys: bool) -> bool:
    """Whether columns of its tiles are tokens, which then lie in the order of its planes."""
    return quantizer.scheme.bits != 16 and is_channel_major(quantizer.scheme, keys)


def forms_of(quantizers: tuple[AnyQuantizer, AnyQuantizer], heads: int, dim: int, kinds: tuple[str, str]) -> tuple[Form, Form]:
    """The forms of keys and values. kinds: of exact numbers."""
    sides = list(zip(quantizers, (True, False), kinds, strict=True))
    planes = [PLANES[quantizer.scheme.code_bits][0] for quantizer, keys, _ in sides if _ordered(quantizer, keys)]
    order = max(planes, default=8)  # one for both, where their columns are tokens
    first, second = (_form(quantizer, keys, heads, dim, order, kind) for quantizer, keys, kind in sides)
    return first, second


def _form(quantizer: AnyQuantizer, keys: bool, heads: int, dim: int, order: int, kind: str) -> Form:
    scheme = quantizer.scheme
    channel_major = is_channel_major(scheme, keys)
    exact = scheme.bits == 16
    wide = 4
    if not channel_major:
        order = 8 if exact else PLANES[scheme.code_bits][0]
        planes = (8,) if exact else PLANES[scheme.code_bits]
        wide = 4 if all(dim * plane % 32 == 0 for plane in planes) and not exact else 1
    forms = scheme.range_forms(heads, BLOCK, dim)
    own = folds(quantizer, channel_major)
    shape, ranges = (1, 1, 1), "none"
    if forms:
        shape, ranges = forms["scale"][0], "held"
    elif scheme.static and not own:
        shape, ranges = (heads, 1, dim), "fixed"
    expected = scheme.outliers * BLOCK * dim
    return Form(
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
        nonzeros=min(max(power_of_2(int(1.25 * expected)), FEWEST_NONZEROS), MOST_NONZEROS) if expected else 0,
        kind=kind,
    )


def _kind(store: LayerStore, side: int) -> str:
    """Of exact numbers: all of them, or outliers. Raises UnsupportedModelError where kernels do not read it."""
    exact = store.quantizers[side].scheme.bits == 16
    if store.tail:
        room = store.tail.rooms[side]
        found = room.codes if exact else room.outlier_values
    else:
        page = store.blocks.columns[0].page if store.blocks.columns else None
        packed = None if page is None else (page.keys, page.values)[side]
        found = None if packed is None else packed.planes[0] if exact else packed.outlier_values
    dtype = torch.float16 if found is None else found.dtype
    if dtype not in KINDS:
        raise UnsupportedModelError(f"Backend cuda does not read numbers kept in {dtype}; choose backend torch.")
    return KINDS[dtype]


def _angles(rope: Rope) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions 0 to 63, [2, pairs, 64] float32, and frequencies in turns, [pairs] float64."""
    frequencies = rope.inverse_frequencies
    known = _ANGLES.get(frequencies)
    if known is None:
        angles = frequencies.double()[:, None] * torch.arange(BLOCK, device=frequencies.device, dtype=torch.int64)
        near = torch.stack([angles.cos(), angles.sin()]).float().contiguous()
        known = _ANGLES[frequencies] = (near, frequencies.double() / (2 * torch.pi))
    return known
