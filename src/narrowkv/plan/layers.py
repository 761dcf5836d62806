"""What the store of one layer allocates, found by filling a real one and counting its tensors.

Short contexts are stored as they are. A longer one is a short one of the same remainder and whole blocks more, each of which
takes as many bytes as the one before; the page that is allocated once decoding seals a block is allocated at its true size,
on torch's meta device, by the store's own code.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer, QuantizedTensor, Scheme, TrellisQuantizer, quantizer_for
from narrowkv.codec.scheme_parts import BLOCK
from narrowkv.integrations.projections import ConstantKinds, Constants, bias_of, with_gain
from narrowkv.store import LayerStore, PositionBuffer
from narrowkv.store.page import GROWTH, Page

Quantizers = tuple[AnyQuantizer, AnyQuantizer]
CHUNK = 2048  # tokens of a prompt at a time, where a sliding window lets go of those before
NO_CONSTANTS = ConstantKinds()
DECODED = BLOCK + 1  # tokens after which decoding has sealed a block and opened a tail


@dataclass(frozen=True)
class LayerShape:
    """One layer's part of a cache: batch, KV heads of one device, head_dim, dtype of the elements, its sliding window, and
    what projections and a norm do to all keys and values alike.
    """

    batch: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    sliding_window: int | None = None
    constants: ConstantKinds = NO_CONSTANTS


@dataclass(frozen=True)
class AllocatedBytes:
    """Bytes after a prompt was read, and once decoding goes on from there, for about a sixteenth more tokens."""

    prompt: int
    decoding: int

    @property
    def most(self) -> int:
        """What must find capacity: a sliding window stores more while a prompt is read than later."""
        return max(self.prompt, self.decoding)

    def __add__(self, other: "AllocatedBytes") -> "AllocatedBytes":
        return AllocatedBytes(self.prompt + other.prompt, self.decoding + other.decoding)

    def __mul__(self, times: int) -> "AllocatedBytes":
        return AllocatedBytes(self.prompt * times, self.decoding * times)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes allocated by all of them, shared storage counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def stand_in(scheme: Scheme, kv_heads: int, head_dim: int) -> AnyQuantizer:
    """A quantizer with tables of the shapes that calibration learns, by which elements of magnitude 1 are outliers."""
    if not scheme.needs_calibration:
        return quantizer_for(scheme)
    if scheme.datatype == "trellis":
        return _trellis_stand_in(scheme, kv_heads, head_dim)
    by_channel = torch.ones(kv_heads, head_dim, dtype=torch.float32, device="cpu")
    tables = {}
    if scheme.datatype == "nuq":
        tables["codebook"] = torch.linspace(-1, 1, 2**scheme.code_bits, dtype=torch.float32, device="cpu")
    if scheme.static:
        tables |= {"scale": by_channel, "zero": 0 * by_channel}
    if scheme.outliers.by_matrix or (scheme.static and scheme.outliers.fraction):
        limits = torch.ones(1, 1, dtype=torch.float32, device="cpu") if scheme.outliers.by_matrix else by_channel
        tables |= {"lower": -limits / 2, "upper": limits / 2}
    if scheme.transform.smooth_alpha:
        tables["smooth"] = by_channel
    return quantizer_for(scheme, **tables)


def _trellis_stand_in(scheme: Scheme, kv_heads: int, head_dim: int) -> TrellisQuantizer:
    """One that decodes to zeros, so that whatever is not 0 is missed."""
    tables = {
        name: torch.zeros(shape, dtype=dtype, device="cpu")
        for name, (shape, dtype) in TrellisQuantizer.forms(scheme, kv_heads, head_dim).items()
    }
    n = scheme.outlier_positions(head_dim)
    for name in ("steps", "scales", "weight", *(("matrix_steps",) if scheme.transform.learned_rotation else ())):
        tables[name].fill_(1)
    if "outlier_threshold" in tables:
        tables["outlier_threshold"].fill_(0.5)
    if scheme.transform.learned_rotation:
        tables["matrix"] += torch.eye(n, head_dim, dtype=torch.int8, device="cpu")
    else:
        tables["order"] += torch.arange(n, dtype=tables["order"].dtype, device="cpu")
        tables["pairs"] += torch.eye(2, dtype=torch.float16, device="cpu")
    if scheme.transform.pre_rope:
        tables["channels"] += torch.arange(head_dim, dtype=tables["channels"].dtype, device="cpu")
    return TrellisQuantizer(scheme, **tables)


def typical_block(quantizer: AnyQuantizer, shape: LayerShape) -> Tensor:
    """64 tokens [batch, kv_heads, 64, head_dim] of which as many elements are outliers as the scheme has.

    Where thresholds are learned, that is the fraction itself, to the nearest integer in a block, spread evenly. Where
    they are taken online, no two elements at the ends of a vector are equal, so that as many are outliers as can be.
    """
    scheme, (heads, dim) = quantizer.scheme, (shape.kv_heads, shape.head_dim)
    if getattr(quantizer, "lower", None) is not None or getattr(quantizer, "outlier_threshold", None) is not None:
        codes = scheme.outlier_positions(dim)
        total = BLOCK * heads * codes
        count = round(scheme.outliers.fraction * total)
        chosen = torch.zeros(total, dtype=torch.float32, device="cpu")
        chosen[torch.arange(count, dtype=torch.int64, device="cpu") * total // max(count, 1)] = 1
        block = torch.zeros(heads, BLOCK, dim, dtype=torch.float32, device="cpu")
        block[:, :, :codes] = chosen.view(BLOCK, heads, codes).transpose(0, 1)
    else:
        rank = torch.arange(heads * dim, dtype=torch.int64, device="cpu")
        from_end = torch.minimum(rank, heads * dim - 1 - rank)
        step = 1.5 * torch.finfo(shape.dtype).eps  # so that neighbors differ in 16 bits too
        token = torch.exp(-step * from_end) * torch.where(rank < heads * dim // 2, -1.0, 1.0)
        block = token.view(dim, heads).T[:, None].expand(-1, BLOCK, -1)
    return block.to(shape.dtype).expand(shape.batch, -1, -1, -1)


class _Filling:
    """A real store, and the record of what rotates its keys, that take tokens as a layer of a cache does."""

    def __init__(self, layer: "LayerBytes", record: Tensor | None):
        self.store = layer.store()
        self.position_buffer = PositionBuffer()
        self.blocks = layer.blocks
        self.sliding_window = layer.shape.sliding_window
        self.record = record

    def read(self, tokens: int) -> None:
        """A prompt: at once, or chunk by chunk where the window slides."""
        chunk = tokens if self.sliding_window is None else CHUNK
        for start in range(0, tokens, chunk):
            self.take(min(chunk, tokens - start))

    def decode(self) -> None:
        for _ in range(DECODED):
            self.take(1)

    def take(self, count: int) -> None:
        start = self.store.length % BLOCK
        if self.sliding_window is not None:
            self.position_buffer.evict(self.store.first)
            self.store.evict(self.store.length - self.sliding_window + 1)
        times = -(-(start + count) // BLOCK)
        keys, values = (block.repeat(1, 1, times, 1)[:, :, start : start + count] for block in self.blocks)
        self.store.append(keys, values)
        if self.record is not None:
            self.position_buffer.append(self.record.expand(-1, count, *self.record.shape[2:]))


class LayerBytes:
    """Counts what one layer takes at any length."""

    def __init__(self, quantizers: Quantizers, sinks: int, window: int, shape: LayerShape):
        """quantizers, sinks, window: like those of LayerStore."""
        known, (keys, values) = _stand_in_constants(shape), quantizers
        self.quantizers = (with_gain(keys, known), values)
        self.bias = bias_of(known, None, keys.scheme, values.scheme, torch.device("cpu"))
        self.options = (sinks, window)
        self.shape = shape
        self.blocks = [typical_block(quantizer, shape) for quantizer in quantizers]
        store = self.store()
        exact = sinks + window + store.tokens_per_group + max(store.lookahead)
        self.settled = (-(-exact // BLOCK) + 1) * BLOCK  # tokens after which a block takes as much as the one before

    def store(self) -> LayerStore:
        """An empty store of the layer."""
        return LayerStore(*self.quantizers, *self.options, self.bias)

    @property
    def tables(self) -> int:
        """Bytes of what is learned or fixed for the layer."""
        return nbytes(table for quantizer in self.quantizers for table in quantizer.tensors().values())

    def allocated(self, tokens: int) -> AllocatedBytes:
        """What is allocated behind a prompt of this many tokens."""
        if self.shape.sliding_window is not None:
            return self._stored(self._steady(tokens))[0]
        if tokens < 2 * GROWTH * BLOCK + self.settled:  # growing pages have one block so far
            return self._stored(tokens)[0]
        short, columns, first, pages = self._settled(tokens % BLOCK)
        more = (tokens - self.settled) // BLOCK
        page = Page.to_grow(self.quantizers, columns + more, self.shape.batch, *first)
        return short + AllocatedBytes(more * self._block, more * self._block - pages + nbytes(page.tensors()))

    def records(self, tokens: int, record: Tensor) -> AllocatedBytes:
        """Bytes of what is stored of each token to rotate its keys: such as `record` [batch, 1, ...]."""
        if self.shape.sliding_window is not None:
            return self._stored(self._steady(tokens), record)[1]
        position_buffer, record = PositionBuffer(), record.to("meta")
        position_buffer.append(record.expand(-1, tokens, *record.shape[2:]))
        prompt = nbytes(position_buffer.tensors())
        for _ in range(DECODED):
            position_buffer.append(record)
        return AllocatedBytes(prompt, nbytes(position_buffer.tensors()))

    def _stored(self, tokens: int, record: Tensor | None = None) -> tuple[AllocatedBytes, AllocatedBytes]:
        """Bytes of a store that has really taken this many tokens, and of its position buffer."""
        filling = _Filling(self, record)
        counts = []
        for go_on in (lambda: filling.read(tokens), filling.decode):
            go_on()
            counts += [nbytes(filling.store.tensors()), nbytes(filling.position_buffer.tensors())]
        return AllocatedBytes(counts[0], counts[2]), AllocatedBytes(counts[1], counts[3])

    def _steady(self, tokens: int) -> int:
        """The shortest prompt that leaves a sliding window as one of this many tokens does."""
        least = self.settled + (self.shape.sliding_window or 0) + 2 * CHUNK
        return tokens - max(tokens - least, 0) // CHUNK * CHUNK

    @functools.cached_property
    def _block(self) -> int:
        """Bytes of one more block of a prompt, for all sequences."""
        counts = []
        for tokens in (self.settled, self.settled + BLOCK):
            filling = _Filling(self, None)
            filling.read(tokens)
            counts.append(nbytes(filling.store.tensors()))
        return counts[1] - counts[0]

    @functools.lru_cache(maxsize=BLOCK)  # noqa: B019
    def _settled(self, rest: int) -> tuple[AllocatedBytes, int, tuple[QuantizedTensor, QuantizedTensor], int]:
        """A short prompt: bytes, blocks, the first of those that decoding seals, and bytes of the pages that these lie in."""
        filling = _Filling(self, None)
        store = filling.store
        filling.read(self.settled + rest)
        columns, prompt = len(store.blocks.columns), nbytes(store.tensors())
        filling.decode()
        later = store.blocks.columns[columns:]
        pages = {id(column.page): column.page for column in later}.values()
        sides = (later[0].page.keys, later[0].page.values)
        keys, values = (_on_meta(side.take(later[0].slots)) for side in sides)
        return (
            AllocatedBytes(prompt, nbytes(store.tensors())),
            columns,
            (keys, values),
            sum(nbytes(page.tensors()) for page in pages),
        )


def _stand_in_constants(shape: LayerShape) -> Constants:
    """Constants of the kinds that a layer has: nothing is added, and channels are scaled differently."""
    gain = torch.linspace(1, 2, shape.head_dim, dtype=torch.float32, device="cpu").expand(shape.kv_heads, -1)
    kinds = shape.constants
    keys, values = (torch.zeros_like(gain) if biased else None for biased in (kinds.keys, kinds.values))
    return Constants(keys, values, gain if kinds.gain else None)


def _on_meta(encoded: QuantizedTensor) -> QuantizedTensor:
    """The same shapes and dtypes without memory behind them."""
    index, values = (None if part is None else part.to("meta") for part in (encoded.outlier_index, encoded.outlier_values))
    ranges = {name: part.to("meta") for name, part in encoded.ranges.items()}
    return QuantizedTensor(encoded.codes.to("meta"), ranges, index, values)
