"""Decoding by a CUDA graph: the launches of a whole step of a model are captured once, and replayed for each token.

What changes from step to step is given to the kernels by elements on the device, which the host writes before each replay;
memory is allocated, and blocks are sealed, between replays. A step is captured anew where memory that it reads has moved.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from narrowkv.attention.cuda import decode as cuda
from narrowkv.attention.cuda.block_table import BlockTable
from narrowkv.calibration.wrappers import decoder_of, unwrapped
from narrowkv.codec.cuda.encode import to_device_async
from narrowkv.errors import CacheUseError, NarrowKVError, UnsupportedModelError
from narrowkv.integrations.cache import PackedCache, require_packed
from narrowkv.integrations.hold import not_traced
from narrowkv.integrations.hooks import ANOTHER_MODEL
from narrowkv.integrations.layer import PackedLayer
from narrowkv.integrations.versions import CACHE, NAMES, cache_of
from narrowkv.store import LayerStore

ROW = 16  # elements given to a layer: `cuda.lengths`, and where its tail, its window and its position buffer are written
CAPACITY_STEP = 1024  # tokens for which masks and positions fit at a time, so that steps are seldom captured anew
# arguments besides the token that do not change what a step computes
KNOWN = {*NAMES, "position_ids", "attention_mask", "use_cache", "return_dict", "logits_to_keep", "cache_position"}


@contextlib.contextmanager
def cuda_graph(model: PreTrainedModel, cache: PackedCache) -> Iterator["DecodingGraph"]:
    """Context in which decoding of single tokens with this cache, as in `generate`, replays one CUDA graph of the model.

    Everything else (prefill, other caches) runs as before. Raises like `DecodingGraph`.
    """
    model = unwrapped(model)
    graph, plain = DecodingGraph(model, cache), model.forward

    @not_traced
    @functools.wraps(plain)
    def forward(input_ids: Tensor | None = None, **options: Any) -> Any:
        single = input_ids is not None and input_ids.shape[1] == 1
        if input_ids is None or not single or cache_of(options) is not cache or cache.length == 0:
            graph.padded = None  # a prompt may bring padding
            return plain(input_ids, **options)
        others = [name for name, part in options.items() if name not in KNOWN and part is not None and part is not False]
        if others:
            raise UnsupportedModelError(f"A step by a CUDA graph returns only logits; call it without {', '.join(others)}.")
        logits = graph.step(input_ids, options.get("position_ids"), options.get("attention_mask"))
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    replaced = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    try:
        yield graph
    finally:
        if replaced is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = replaced


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Within, what waits for the GPU raises RuntimeError: a capture would fail there, and leave torch unable to go on."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A function that does again on the device what `run` does, and where its result then is."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class DecodingGraph:
    """Decode one token of each sequence at a time by replaying one CUDA graph of the model, after a prompt was read.

    cache: a PackedCache of the model, with backend `cuda`. `cuda_graph` uses a graph in `generate`.
    Raises UnsupportedModelError where the cache does not decode by backend `cuda`, or a layer is not packed, CacheUseError
    where it is no packed cache, or another model's.
    """

    def __init__(self, model: PreTrainedModel, cache: PackedCache):
        model = unwrapped(model)
        require_packed(cache)
        if cache.decoder() is not decoder_of(model):
            raise CacheUseError(ANOTHER_MODEL)
        if any(layer.backend != "cuda" for layer in cache.packed):
            raise UnsupportedModelError(
                f"A CUDA graph needs a cache with backend cuda, not {cache.backend}; decode without one."
            )
        if len(cache.packed) != len(cache.layers) or any(layer.is_exact for layer in cache.packed):
            raise UnsupportedModelError(
                "A CUDA graph decodes layers that are all packed, which not all are; decode without one."
            )
        self.forward, self.cache = model.forward, cache
        # a row is a multiple of 16 bytes, so that kernels are the same for all layers
        self.device_lengths = torch.zeros(len(cache.packed), ROW, dtype=torch.int32, device=cache.device)
        self.padded: bool | None = None  # whether a mask hides tokens, once one was looked at
        self._mask: Tensor | None = None  # [batch, capacity] bool, if so
        self._memory: _Memory | None = None  # what was captured
        self._blank: dict[tuple[tuple[int, int, int], torch.dtype], Tensor] = {}
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._replay: Callable[[], None] | None = None
        self._logits: Tensor | None = None

    def step(self, token_ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits [batch, 1, vocabulary] of the tokens after token_ids [batch, 1], which join the cache.

        positions: [batch, 1], of these tokens in their sequences; by default the number of stored tokens. mask: [batch,
        tokens], 0 for padding, these tokens included. Raises CacheUseError while the cache is empty, UnsupportedModelError
        where a step cannot be captured, ActivationError, up to a block of tokens late, where elements cannot be stored.
        """
        cache, device = self.cache, self.device_lengths.device
        if cache.length == 0:
            raise CacheUseError("The cache is empty; let the model read a prompt before it decodes by a CUDA graph.")
        positions = torch.full_like(token_ids, cache.length) if positions is None else positions
        token_ids, positions = (x.to(device) for x in (token_ids, positions.expand_as(token_ids)))
        with torch.no_grad(), torch.cuda.device_of(self.device_lengths):
            cache.readback.receive()
            self._look_at(mask if mask is None else mask.to(device))
            self._prepare_step(cache.packed)
            self._count(1)
            try:
                self._prepare(token_ids, positions)
                assert self._inputs is not None and self._replay is not None and self._logits is not None
                for buffer, given in zip(self._inputs, (token_ids, positions), strict=True):
                    buffer.copy_(given)
                self._replay()
            except BaseException:
                self._count(-1)
                raise
            self._seal(cache.packed)
            return self._logits.clone()

    def _look_at(self, mask: Tensor | None) -> None:
        """Store what a mask hides where the graph reads it; the first mask after a prompt says whether it hides anything."""
        if self.padded is None:
            self.padded = mask is not None and not bool(mask.all())
        if not self.padded or mask is None:
            self._mask = self._mask if self.padded else None
            return
        if self._mask is None or len(self._mask) != len(mask) or self._mask.shape[1] < mask.shape[1]:
            self._mask = mask.new_ones(len(mask), mask.shape[1] + CAPACITY_STEP, dtype=torch.bool)
        self._mask[:, : mask.shape[1]] = mask

    def _prepare_step(self, layers: list[PackedLayer]) -> None:
        """On the host: let go of what no step sees any more, and find space for a token in every layer."""
        for layer in layers:
            layer.evict()
            if not layer.store.prepare_step(*self._likes(layer.store)):
                raise UnsupportedModelError(
                    "A captured step cannot store tokens that no kernel encodes one by one, or before all attention sinks "
                    "have come; decode without a CUDA graph."
                )
        for position_buffer in self.cache.position_buffers.values():
            position_buffer.evict(self.cache.first_needed(position_buffer))
            if position_buffer.length - position_buffer.first == position_buffer.buffer.shape[1]:
                position_buffer.reserve(CAPACITY_STEP, position_buffer.buffer[:, :1])

    def _likes(self, store: LayerStore) -> tuple[Tensor, Tensor]:
        """Keys and values of a token of a layer [batch, heads, 1, head_dim], whose elements do not matter."""
        assert store.shape is not None and store.dtypes is not None
        batch, heads, dim = store.shape
        for dtype in store.dtypes:
            if (store.shape, dtype) not in self._blank:
                blank = torch.empty(batch, heads, 1, dim, dtype=dtype, device=self.cache.device)
                self._blank[store.shape, dtype] = blank
        return self._blank[store.shape, store.dtypes[0]], self._blank[store.shape, store.dtypes[1]]

    def _count(self, new: int) -> None:
        """On the host: count the token that the device is about to store."""
        for layer in self.cache.packed:
            layer.store.advance(new)
        for position_buffer in self.cache.position_buffers.values():
            position_buffer.length += new

    def _prepare(self, token_ids: Tensor, positions: Tensor) -> None:
        """Send all lengths to the device; capture the step if what it reads is not where it was."""
        rows, memory = [], _Memory([token_ids.shape], [self._mask])
        for layer in self.cache.packed:
            row, blocks = self._lengths_of(layer)
            rows.append(row)
            memory.add(layer, blocks)
        self.device_lengths.copy_(to_device_async(rows, self.device_lengths.device))
        if self._memory is None or not memory.is_where(self._memory):
            self._memory = self._replay = self._logits = None  # before memory is taken for others
            self._capture(token_ids, positions)
            self._memory = memory

    def _lengths_of(self, layer: PackedLayer) -> tuple[list[int], BlockTable]:
        """What is given to the kernels of a layer, where tokens are written last; and its blocks, looked at before."""
        store, position_buffer = layer.store, layer.position_buffer
        past = store.length if layer.strict else store.length - 1
        rope_state = position_buffer.read(store.first, past) if position_buffer and layer.rotates_on_read else None
        blocks = cuda.blocks_for(store, layer.rope, rope_state, self._mask)
        counts = cuda.lengths(
            store, blocks, past, store.length, 1, store.first - position_buffer.first if position_buffer else 0
        )
        offsets = (
            store.tail.tokens if store.tail else 0,
            store.residual.tokens,
            position_buffer.length - position_buffer.first if position_buffer else 0,
        )
        return [*counts, *(offset - 1 for offset in offsets), 0], blocks

    def _capture(self, token_ids: Tensor, positions: Tensor) -> None:
        self._inputs = inputs = (token_ids.clone(), positions.clone())

        def run() -> Tensor:
            options = {"position_ids": inputs[1], "attention_mask": self._mask, CACHE: self.cache}
            logits: Tensor = self.forward(input_ids=inputs[0], use_cache=True, **options).logits
            return logits

        counted = [(counter.counts, counter.counts.clone()) for counter in self.cache.counters()]

        def rehearse() -> None:  # leaves what the first replay writes again, and counts nothing
            try:
                run()
            finally:
                for counts, before in counted:
                    counts.copy_(before)

        with self._layers_captured():
            try:
                rehearse()  # compiles what was not yet
                if self.device_lengths.is_cuda:
                    with without_waiting():
                        rehearse()
                self._replay, self._logits = capture(run)
            except NarrowKVError:
                raise
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                raise UnsupportedModelError(
                    f"A step of this model cannot be captured ({why}); decode without a graph."
                ) from error

    @contextlib.contextmanager
    def _layers_captured(self) -> Iterator[None]:
        """Within, layers do of a step what the device does."""
        cache, leading = self.cache, {id(layer.position_buffer): layer for layer in reversed(self.cache.packed)}
        cache.captured = True
        for layer, row in zip(cache.packed, self.device_lengths, strict=True):
            layer.device_lengths, layer.owns_positions = row, leading[id(layer.position_buffer)] is layer
        try:
            yield
        finally:
            cache.captured = cache.running = False
            for layer in cache.packed:
                layer.device_lengths, layer.owns_positions = None, False

    def _seal(self, layers: list[PackedLayer]) -> None:
        """On the host: seal full tails, for which all counts are waited for at once."""
        cache = self.cache
        if any(layer.store.tail and layer.store.tail.is_full for layer in layers):
            cache.readback.settle(cache.counters())
            for layer in layers:
                layer.store.seal()
        cache.readback.send(cache.counters())


@dataclass
class _Memory:
    """Where all lies that kernels of a step read and write, and what of it they are compiled for."""

    info: list[Any]
    parts: list[Tensor | None]

    def add(self, layer: PackedLayer, blocks: BlockTable) -> None:
        store, position_buffer = layer.store, layer.position_buffer
        self.info += [blocks.count > 0, blocks.rope_mode]
        self.parts += [blocks.table, blocks.starts, blocks.bases, *(store.tail.tensors() if store.tail else ())]
        self.parts += [*store.residual.tensors(), *(store.sinks.elements or ()), store.sinks.index]
        self.parts.append(None if position_buffer is None else position_buffer.buffer)

    def is_where(self, other: "_Memory") -> bool:
        """Whether everything lies where that of another does; most are the same tensors."""
        if self.info != other.info or len(self.parts) != len(other.parts):
            return False
        return all(one is two or _layout(one) == _layout(two) for one, two in zip(self.parts, other.parts, strict=True))


def _layout(part: Tensor | None) -> Any:
    return None if part is None else (part.data_ptr(), part.shape, part.stride())
