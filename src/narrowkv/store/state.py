"""A layer's store as named tensors, and back: the format of a cache on disk. Nothing is re-encoded on the way."""

import math

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer, QuantizedTensor, Scheme
from narrowkv.codec.packing import PLANES, plane_bytes
from narrowkv.errors import FileFormatError
from narrowkv.store.layer import LayerStore
from narrowkv.store.page import BLOCK, BlockTableEntry, Dtypes, PackedTensor, Page, Shape, gather, is_channel_major
from narrowkv.store.tail import Tail
from narrowkv.tensor_file import require_finite

SIDES = ("keys", "values")
ENCODED = ("codes", "outlier_index", "outlier_values")
PACKED = ("outlier_values", "outlier_index", "outlier_offsets")


def to_tensors(store: LayerStore) -> dict[str, Tensor]:
    """Everything in a store, in memory of its own, by name.

    `evicted` [] int64 tokens evicted; `missing` [] int64 first tokens that never came, if placeholders are stored for some of
    them; `block_tokens`
    [blocks] int32 tokens of each block; `keys.plane0`, `keys.scale`, ... of the blocks, block after block, each for all
    sequences; `tail.keys.codes`, ...; `residual.keys`, `residual_skip`; `sinks.keys`, `sink_index`.
    """
    found: dict[str, Tensor] = {}
    if store.first:
        found["evicted"] = torch.tensor(store.first, dtype=torch.int64, device="cpu")
    if store.missing > store.first:
        found["missing"] = torch.tensor(store.missing, dtype=torch.int64, device="cpu")
    if store.blocks.columns:
        counts = [column.count for column in store.blocks.columns]
        found["block_tokens"] = torch.tensor(counts, dtype=torch.int32, device="cpu")
        page = gather(store.quantizers, store.blocks.columns)
        for name, side in zip(SIDES, (page.keys, page.values), strict=True):
            found |= {f"{name}.plane{i}": plane for i, plane in enumerate(side.planes)}
            found |= {f"{name}.{part}": tensor for part, tensor in side.ranges.items()}
            found |= {f"{name}.{part}": getattr(side, part) for part in PACKED if getattr(side, part) is not None}
    for name, encoded in zip(SIDES, store.tail.encoded() if store.tail and store.tail.tokens else (), strict=False):
        found |= {f"tail.{name}.{part}": tensor for part, tensor in encoded.ranges.items()}
        found |= {f"tail.{name}.{part}": getattr(encoded, part) for part in ENCODED if getattr(encoded, part) is not None}
    exact: dict[str, Tensor] = {}
    if store.residual.tokens:
        exact |= dict(zip(("residual.keys", "residual.values", "residual_skip"), store.residual.stored(), strict=True))
    exact |= {f"sinks.{name}": elements for name, elements in zip(SIDES, store.sinks.elements or (), strict=False)}
    if store.sinks.index is not None:
        exact["sink_index"] = store.sinks.index
    found |= {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in exact.items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


class _Reader:
    """Takes tensors from a file one by one, each of the shape and dtype it must have."""

    def __init__(self, tensors: dict[str, Tensor], dtypes: tuple[torch.dtype, torch.dtype]):
        self.tensors = dict(tensors)
        self.dtypes = dict(zip(SIDES, dtypes, strict=True))  # of exact elements
        self.dtypes16 = {side: dtype if dtype.itemsize == 2 else torch.float16 for side, dtype in self.dtypes.items()}

    def take(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise FileFormatError(f"tensor {name} is missing")
        fits = len(tensor.shape) == len(shape) and all(
            size in (None, real) for size, real in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            raise FileFormatError(f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
        require_finite(name, tensor)
        return tensor

    def take_ranges(self, prefix: str, scheme: Scheme, rows: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Stored online ranges. shape: kv_heads, tokens, codes of a head."""
        forms = scheme.range_forms(*shape)
        ranges = {name: self.take(f"{prefix}.{name}", (rows, *form), dtype) for name, (form, dtype) in forms.items()}
        for name in ("scale", "token_scale"):
            _require(name not in ranges or bool((ranges[name].float() >= 0).all()), f"{prefix}.{name}")
        _require("levels" not in ranges or bool((ranges["levels"].diff() >= 0).all()), f"{prefix}.levels")
        return ranges

    def take_exact(self, prefix: str, shape: tuple[int | None, ...]) -> tuple[Tensor, Tensor]:
        """Exact keys and values."""
        keys, values = (self.take(f"{prefix}.{side}", shape, dtype) for side, dtype in self.dtypes.items())
        return keys, values


def load_tensors(store: LayerStore, tensors: dict[str, Tensor], shape: Shape, dtypes: Dtypes, device: torch.device) -> None:
    """Fill an empty store from `to_tensors`.

    dtypes: of elements that are exact. device: where the tensors lie. Raises FileFormatError where a tensor is missing, is one
    too many, or has a shape, a dtype or contents that no store would have written.
    """
    reader, (batch, heads, dim) = _Reader(tensors, dtypes), shape
    store.reset()
    store.begin(shape, dtypes, device)
    if "evicted" in reader.tensors:
        store.first = int(reader.take("evicted", (), torch.int64))
        _require(store.first > 0, "evicted")
    if "missing" in reader.tensors:
        store.missing = int(reader.take("missing", (), torch.int64))
        _require(store.missing > store.first, "missing")
    if "block_tokens" in reader.tensors:
        counts = reader.take("block_tokens", (None,), torch.int32)
        _require(len(counts) > 0 and bool(((counts > 0) & (counts <= BLOCK)).all()), "block_tokens")
        sides = [
            _load_side(reader, name, quantizer, len(counts) * batch, heads, dim)
            for name, quantizer in zip(SIDES, store.quantizers, strict=True)
        ]
        page = Page(len(counts) * batch, sides[0], sides[1])
        page.used = page.slots
        slots = torch.arange(page.slots, dtype=torch.int64, device="cpu").view(-1, batch)
        store.blocks.hold([BlockTableEntry(page, row.clone(), int(count)) for row, count in zip(slots, counts, strict=True)])
    if "tail.keys.codes" in reader.tensors:
        pair = [_load_tail(reader, name, q, shape) for name, q in zip(SIDES, store.quantizers, strict=True)]
        _require(pair[0].tokens == pair[1].tokens < BLOCK, "tail.keys.codes")
        keys, values = (torch.empty(batch, heads, 0, dim, dtype=dtype, device=pair[0].codes.device) for dtype in dtypes)
        store.tail = Tail(store.quantizers, keys, values)
        store.tail.put((pair[0], pair[1]))
    if "residual.keys" in reader.tensors:
        keys, values = reader.take_exact("residual", (batch, heads, None, dim))
        _require(
            keys.shape == values.shape and keys.shape[2] < store.residual_length + store.tokens_per_group, "residual.keys"
        )
        store.residual.shift(0, keys, values, reader.take("residual_skip", (batch, keys.shape[2]), torch.bool))
    count = store.sinks.count
    if count and store.length:
        keys, values = reader.take_exact("sinks", (batch, heads, count, dim))
        store.sinks.elements = (keys.clone(), values.clone())
        store.sinks.index = reader.take("sink_index", (batch, count), torch.int64).clone()
        _require(_are_sinks(store.sinks.index, store.length), "sink_index")
    if reader.tensors:
        raise FileFormatError(f"tensor {min(reader.tensors)} does not belong to this recipe")


def _are_sinks(index: Tensor, length: int) -> bool:
    """Whether these can be the first real tokens of sequences [batch, sinks]: ascending, then -1 where there were no more."""
    unseen = index == -1
    follows = (index.diff() > 0) & ~unseen[:, :-1] | unseen[:, 1:]
    return bool(((index >= -1) & (index < length)).all() and follows.all())


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise FileFormatError(f"tensor {name} has elements that no cache has")


def _load_side(reader: _Reader, name: str, quantizer: AnyQuantizer, slots: int, heads: int, dim: int) -> PackedTensor:
    scheme, channel_major = quantizer.scheme, is_channel_major(quantizer.scheme, name == "keys")
    dim, positions = scheme.codes(dim), scheme.outlier_positions(dim)
    rows, length = (dim, BLOCK) if channel_major else (BLOCK, dim)
    if scheme.bits == 16:
        exact = reader.take(f"{name}.plane0", (slots, heads, BLOCK, dim), reader.dtypes[name])
        return PackedTensor((heads, BLOCK, dim), 16, channel_major, [exact])
    planes = [
        reader.take(f"{name}.plane{i}", (slots, heads, rows, plane_bytes(length, plane)), torch.uint8)
        for i, plane in enumerate(PLANES[scheme.code_bits])
    ]
    ranges, outliers = reader.take_ranges(name, scheme, slots, (heads, BLOCK, dim)), None
    if scheme.outliers.fraction:
        values = reader.take(f"{name}.outlier_values", (None,), reader.dtypes16[name])
        index = reader.take(f"{name}.outlier_index", (len(values),), torch.int16)
        offsets = reader.take(f"{name}.outlier_offsets", (slots * heads + 1,), torch.int32)
        ordered = offsets[0] == 0 and offsets[-1] == len(values) and bool((offsets.diff() >= 0).all())
        _require(bool(ordered), f"{name}.outlier_offsets")
        _require(bool(((index >= 0) & (index.int() < BLOCK * positions)).all()), f"{name}.outlier_index")
        _require(_ascend_within(index, offsets), f"{name}.outlier_index")
        outliers = (values, index, offsets)
    return PackedTensor((heads, BLOCK, positions), scheme.code_bits, channel_major, planes, ranges, outliers)


def _ascend_within(index: Tensor, offsets: Tensor) -> bool:
    """Whether an index [n] ascends between neighboring offsets: kernels dequantize a block in parts, each once."""
    ascends = index.diff() > 0
    begins = offsets[(offsets > 0) & (offsets < len(index))].long() - 1
    ascends[begins] = True
    return bool(ascends.all())


def _load_tail(reader: _Reader, name: str, quantizer: AnyQuantizer, shape: tuple[int, int, int]) -> QuantizedTensor:
    scheme, (batch, heads, dim) = quantizer.scheme, shape
    dim, positions = scheme.codes(dim), scheme.outlier_positions(dim)
    dtype = reader.dtypes[name] if scheme.bits == 16 else torch.uint8
    codes = reader.take(f"tail.{name}.codes", (batch, heads, None, dim), dtype)
    _require(codes.shape[2] > 0, f"tail.{name}.codes")
    encoded = QuantizedTensor(codes, outlier_positions=positions)
    if scheme.bits == 16:
        return encoded
    _require(int(codes.max()) < 2**scheme.code_bits, f"tail.{name}.codes")
    _require(codes.shape[2] % scheme.tokens_per_group == 0, f"tail.{name}.codes")
    encoded.ranges = reader.take_ranges(f"tail.{name}", scheme, batch, (heads, codes.shape[2], dim))
    if scheme.outliers.fraction:
        index = reader.take(f"tail.{name}.outlier_index", (None,), torch.int64)
        encoded.outlier_values = reader.take(f"tail.{name}.outlier_values", (len(index),), reader.dtypes16[name])
        ordered = bool((index.diff() > 0).all()) and (
            len(index) == 0 or bool(index[0] >= 0 and index[-1] < math.prod(encoded.outlier_shape))
        )
        _require(ordered, f"tail.{name}.outlier_index")
        encoded.outlier_index = index
    return encoded
