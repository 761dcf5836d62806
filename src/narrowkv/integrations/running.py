"""RunningCache: a packed cache from run to run of its model: none leaves it half filled unnoticed, and between them sequences
are cropped, picked and repeated.
"""

import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from narrowkv.codec.outlier_counter import CountReadback, OutlierCounter
from narrowkv.codec.surroundings import runs_undisturbed
from narrowkv.errors import CacheUseError, NarrowKVError, NarrowKVWarning, UnsupportedModelError
from narrowkv.integrations.admission import GRADIENTS, ThreadHold, require_fit, wants_gradients
from narrowkv.integrations.dense import DenseLayer
from narrowkv.integrations.hooks import ANOTHER_MODEL, TWO_DIMENSIONS, LayerInputs, NarrowCache
from narrowkv.integrations.layer import PackedLayer, not_traced, share_ropes
from narrowkv.store import PositionBuffer
from narrowkv.store.checks import as_count, as_rows

SATURATED = 1e-2  # part of a layer's elements above which a warning is given


class RunningCache(NarrowCache):
    """Base of PackedCache.

    packed: the layers that keep keys and values. modules: their attention modules, by layer; decoder: the language model.
    position_buffers: what is stored of each token once for all layers. strict: whether new tokens too are attended to as they
    are stored. shapes: kv_heads and head_dim of the packed layers.
    """

    packed: list[PackedLayer]
    modules: dict[int, weakref.ref[nn.Module]]
    decoder: weakref.ref[nn.Module]
    position_buffers: dict[str, PositionBuffer]
    strict: bool
    device: torch.device
    shapes: list[tuple[int, int]]
    model_dtype: torch.dtype  # of the model when the first tokens came; until then, at the creation

    def __init__(self, layers: list[Any]):
        super().__init__(layers=layers)
        share_ropes(self.packed)
        self.captured = False  # while the model runs to be captured in a CUDA graph
        self.warned_of_saturation = False
        self.settle()

    def settle(self) -> None:
        """Let no run be under way, nor any have failed."""
        self.hold = ThreadHold()
        self.before = 0  # tokens stored when the model began to run
        self.running = False  # while the model runs
        self.broken = False  # after a run that has failed half-way
        self.owes_gradients = False  # whether stored elements should have passed gradients on
        self.readback = CountReadback()

    @property
    def length(self) -> int:
        """Tokens of each sequence, padding included."""
        return self.packed[0].store.length

    @property
    def batch_size(self) -> int:
        """Sequences stored, -1 before the first token."""
        shape = self.packed[0].store.shape
        return shape[0] if shape else -1

    @property
    def is_exact(self) -> bool:
        """Whether nothing is quantized, so that gradients flow as they do without a packed cache."""
        return all(layer.is_exact for layer in self.packed)

    def begin(self, module: Any, step: LayerInputs) -> None:
        """Called before each attention module runs; raises CacheUseError if it is another model's."""
        layer = int(module.layer_idx)
        if layer not in self.modules:  # a reader of another layer's keys
            return
        if self.modules[layer]() is not module:
            raise CacheUseError(ANOTHER_MODEL)
        super().begin(module, step)

    @not_traced
    def start(self, decoder: nn.Module, tokens: Tensor | None, mask: Any, positions: Any) -> None:
        """Called before the language model runs.

        Raises CacheUseError if it is another one, if the cache is in use by another thread, after a call that failed half-way,
        or where new tokens do not continue the stored ones; UnsupportedModelError where gradients would be wrong.
        """
        if self.decoder() is not decoder:
            raise CacheUseError(ANOTHER_MODEL)
        self.hold.take()
        try:
            self._require_ready(decoder, tokens, mask, positions)
        except NarrowKVError:
            self.hold.leave()
            raise
        for position_buffer in self.position_buffers.values():
            position_buffer.evict(self.first_needed(position_buffer))
        for layer in self.packed:
            if isinstance(layer, DenseLayer):
                layer.padding = None if mask is None else mask.bool()
        self.running, self.before = True, self.length
        if self.before == 0:
            self.model_dtype = dtype_of(decoder)
            self.follow(decoder)
            share_ropes(self.packed)

    def follow(self, decoder: nn.Module) -> None:
        """Before the first tokens: take on the frequencies that the model has by now; `model.to(dtype)` rounds them."""
        raise NotImplementedError

    def _require_ready(self, decoder: nn.Module, tokens: Tensor | None, mask: Any, positions: Any) -> None:
        if self.running:  # interrupted, so that nobody has announced its end
            self.running, self.broken = False, not self._is_as_before()
        if self.broken:
            raise CacheUseError("An earlier call failed half-way; call cache.reset() and start again.")
        if self.dense and mask is not None and not isinstance(mask, Tensor):
            raise UnsupportedModelError(TWO_DIMENSIONS)
        if self.captured:
            return
        wanted = wants_gradients(decoder, tokens)
        self._require_right_gradients(wanted)
        if tokens is not None:
            stored, shared = self.length, self.hold.shared
            require_fit(tokens, mask, positions, stored=stored, batch_size=self.batch_size, shared=shared)
        if self.length == 0:
            self.owes_gradients = wanted
        self.readback.receive()

    def _require_right_gradients(self, wanted: bool) -> None:
        """Raise UnsupportedModelError where gradients that flow would be wrong: packed elements have none.

        A first chunk attends to itself exactly, so its gradients are right, but not those of what follows.
        """
        flow = torch.is_grad_enabled() and (wanted or self.owes_gradients)
        if flow and not self.is_exact and (self.length or self.strict):
            raise UnsupportedModelError(GRADIENTS)

    @not_traced
    def finish(self, failed: bool) -> None:
        """Called when the language model has run to its end, or has failed."""
        if self.running and self.hold.thread is threading.current_thread():
            self.running = False
            self.broken = failed and not self.captured and not self._is_as_before()
            if not failed and not self.captured:
                self.readback.send(self.counters())
                self._warn_of_saturation()
        self.hold.leave()

    def _is_as_before(self) -> bool:
        """Whether a call that failed has left no trace: it was refused before anything was stored."""
        return len(self.packed) == len(self.layers) and all(layer.store.length == self.before for layer in self.packed)

    @property
    def saturated(self) -> float:
        """The part of the elements seen that lie beyond the ranges and codebooks learned for them, by their width or more.

        0 for recipes that learn none; counted on a CPU, of tokens that come together (prompts, not single steps).
        """
        far, seen = (sum(getattr(layer.store.saturation, name) for layer in self.packed) for name in ("out_of_range", "seen"))
        return far / seen if seen else 0.0

    def _warn_of_saturation(self) -> None:
        worst = max(layer.store.saturation.fraction for layer in self.packed)
        if worst > SATURATED and not self.warned_of_saturation:
            self.warned_of_saturation = True
            warnings.warn(
                f"{worst:.1%} of a layer's keys and values lie far beyond what its calibration has seen, and are stored wrong "
                "(cache.saturated counts them); calibrate on text like this, or choose a recipe with outliers.",
                NarrowKVWarning,
                stacklevel=2,
            )

    @runs_undisturbed
    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; `tokens_to_remove` is negative or 0, as transformers has it. Nothing is re-encoded.

        Raises CacheUseError, and drops nothing, where a layer cannot go back: a sliding window has evicted what the next
        token would need, or a layer without attention keeps no record of its past (assisted decoding lets it); and where that
        is no such number.
        """
        self.hold.require()
        tokens_to_remove = as_count(tokens_to_remove, "Minus the number of tokens to drop")
        length = self.length + tokens_to_remove
        if tokens_to_remove < 0 and length <= 0:
            self.reset()
            return
        for layer in self.packed:
            layer.require_croppable(length)
        for i, own in enumerate(self.layers):
            if i not in self.modules and hasattr(own, "crop"):
                try:
                    own.crop(tokens_to_remove)
                except RuntimeError as error:
                    raise CacheUseError(f"Layer {i} keeps no record of its past and cannot be cropped ({error}).") from error
        for layer in self.packed:
            layer.crop(tokens_to_remove)
        for position_buffer in self.position_buffers.values():
            position_buffer.crop(self.length)

    @runs_undisturbed
    def reorder_cache(self, beam_idx: Any) -> None:
        """Let row i continue the sequence of row beam_idx[i], as `as_rows` reads it; sealed blocks are shared, not copied.

        An empty cache stays empty. Raises CacheUseError where beam_idx does not name rows of the batch.
        """
        self.hold.require()
        if self.batch_size < 0:
            return
        rows = as_rows(beam_idx, self.batch_size)
        super().reorder_cache(rows.to(self.device))  # type: ignore[arg-type]
        for position_buffer in self.position_buffers.values():
            position_buffer.select(rows)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences named by `indices`, repeats allowed, or those that bools keep; raises as `reorder_cache`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, neighbors together; raises CacheUseError where `repeats` is no integer from 1."""
        repeats = as_count(repeats, "How often sequences are repeated")
        if repeats < 1:
            raise CacheUseError(f"Sequences are repeated once or more, not {repeats} times.")
        self.reorder_cache([row for row in range(self.batch_size) for _ in range(repeats)])

    def first_needed(self, position_buffer: PositionBuffer) -> int:
        """The oldest token whose entry some layer still reads."""
        return min(layer.store.first for layer in self.packed if layer.position_buffer is position_buffer)

    def counters(self) -> list[OutlierCounter]:
        """Where a GPU counts what its layers find."""
        return [counter for layer in self.packed for counter in layer.store.counters()]


def dtype_of(decoder: nn.Module) -> torch.dtype:
    """That of the first weights of a language model that are floating point."""
    return next((part.dtype for part in decoder.parameters() if part.is_floating_point()), torch.float32)
