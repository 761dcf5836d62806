"""PackedCache: a drop-in `past_key_values` for transformers that stores keys and values packed."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.attention import AUTO, BACKENDS, chosen, cpu, described
from narrowkv.attention.cuda_blocks import tables_for
from narrowkv.calibration import Calibration, Fingerprint
from narrowkv.calibration.processes import tensor_parallel_rank
from narrowkv.calibration.wrappers import decoder_of, unwrapped
from narrowkv.codec import AnyQuantizer
from narrowkv.codec.tally import Tally
from narrowkv.defaults import DENSE
from narrowkv.errors import CacheUseError, RecipeError, UnsupportedModelError
from narrowkv.integrations.dense import DenseLayer
from narrowkv.integrations.disk import load_cache, save_cache
from narrowkv.integrations.interface import ANOTHER_MODEL, TWO_DIMENSIONS, NarrowCache, Step
from narrowkv.integrations.layer import PackedLayer
from narrowkv.integrations.preparation import facts_for
from narrowkv.integrations.probe import AttentionFacts, own_layers, text_config
from narrowkv.integrations.projections import bias_of
from narrowkv.methods import Recipe, get_recipe
from narrowkv.store import LayerStore, Ledger, steps


class PackedCache(NarrowCache):
    """The keys and values of one batch of running sequences, stored in few bits.

    model: a transformers model, which is made ready for the cache on the way; layers without attention (linear, convolution)
    keep their own state beside the packed ones. source: a Calibration for this model, or a calibration-free Recipe or its
    name. strict: new tokens too are attended to as they are stored (how papers measure perplexity); otherwise a chunk attends
    to itself exactly and to the packed past. backend: which attention runs: `cpu` reads packed blocks in compiled code for up
    to 16 tokens at a time, on a CPU, and prompts as `torch` does, which decodes tile by tile; `cuda` does both by kernels on a
    GPU; `naive` decodes all at once; `dense` hands decoded tensors to models that compute attention by themselves; `auto` is
    `cpu` or `cuda` where that runs and reads the recipe, else `torch`. `cache.backend` says which it is.

    Raises UnsupportedModelError, RecipeError or CalibrationError where the three do not fit together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Calibration | Recipe | str,
        *,
        strict: bool = False,
        backend: str = AUTO,
    ):
        if backend not in (AUTO, *BACKENDS, DENSE):
            raise RecipeError(f"There is no backend {backend!r}; there is {AUTO}, {', '.join(BACKENDS)} and {DENSE}.")
        model = unwrapped(model)
        self.recipe = source.recipe if isinstance(source, Calibration) else get_recipe(source)
        facts = facts_for(model, backend, [self.recipe])
        biased = any(part is not None for fact in facts.attention for part in (fact.constants.keys, fact.constants.values))
        backend = chosen(backend, model.device, model.dtype, self.recipe.every_scheme(), biased)
        self.model_dtype = _dtype_of(model.get_decoder())  # when the first tokens came; until then, at the creation
        self.fingerprint = Fingerprint.of(model)
        if isinstance(source, Calibration):
            source.fingerprint.check(self.fingerprint)
        words = backend == "cpu" and cpu.may_round(model.dtype) and self._in_words(facts.attention)
        self.backend = described(backend, words)
        self.dense = backend == DENSE
        self.device = model.device
        self.before = 0  # tokens held when the model began to run
        self.running = False  # while the model runs, and after a run that did not come to its end
        self.news = steps.News()
        self.captured = False  # while the model runs to be captured in a CUDA graph
        self.ledgers: dict[str, Ledger] = {}
        self.packed: list[PackedLayer] = []
        layers, rank = own_layers(text_config(model)), tensor_parallel_rank(model)
        for fact in facts.attention:
            if isinstance(source, Calibration):
                quantizers = source.for_heads(fact.layer, fact.kv_heads, fact.head_dim, rank)
            else:
                quantizers = self.recipe.quantizers(fact.layer)
            layers[fact.layer] = self._layer(fact, quantizers, layers[fact.layer], backend, strict)
            self.packed.append(layers[fact.layer])
        super().__init__(layers=layers)
        self.shapes = [(fact.kv_heads, fact.head_dim) for fact in facts.attention]
        self.rank = rank
        self.decoder = weakref.ref(decoder_of(model))
        self.modules = {fact.layer: weakref.ref(fact.module) for fact in facts.attention}

    def _in_words(self, facts: Sequence[AttentionFacts]) -> bool:
        """Whether words of 16 bits can be read from all layers."""
        layers = [(self.recipe.schemes(fact.layer), fact) for fact in facts]
        return all(cpu.in_words(schemes.keys, schemes.values, fact.head_dim, fact.rope) for schemes, fact in layers)

    def _layer(
        self, fact: AttentionFacts, quantizers: tuple[AnyQuantizer, AnyQuantizer], own: Any, backend: str, strict: bool
    ) -> PackedLayer:
        keys, values = (quantizer.to(self.device) for quantizer in quantizers)
        for quantizer in (keys, values):
            quantizer.scheme.require_head_dim(fact.head_dim)
        rope = fact.rope.to(self.device) if fact.rope else None
        bias = bias_of(fact.constants, rope, keys.scheme, values.scheme, self.device)
        recorded = rope is not None and (keys.scheme.pre_rope or bias.of_blocks)
        ledger = self.ledgers.setdefault(rope.record, Ledger()) if rope and recorded else None
        bias.ledger = ledger if bias.of_blocks else None
        store = LayerStore(keys, values, self.recipe.sinks, self.recipe.window, bias)
        kind = DenseLayer if self.dense else PackedLayer
        return kind(store, rope, ledger, backend, strict, getattr(own, "sliding_window", None))

    def begin(self, module: Any, step: Step) -> None:
        """Called before each attention module runs; raises CacheUseError if it is another model's."""
        layer = int(module.layer_idx)
        if layer not in self.modules:  # a reader of another layer's keys
            return
        if self.modules[layer]() is not module:
            raise CacheUseError(ANOTHER_MODEL)
        super().begin(module, step)

    def start(self, decoder: torch.nn.Module, mask: Any) -> None:
        """Called before the language model runs; raises CacheUseError if it is another one, or after a call that failed."""
        if self.decoder() is not decoder:
            raise CacheUseError(ANOTHER_MODEL)
        if self.running and not self._is_as_before():
            raise CacheUseError("An earlier call failed half-way; call cache.reset() and start again.")
        for ledger in self.ledgers.values():
            ledger.forget(self.first_needed(ledger))
        if self.dense:
            if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
                raise UnsupportedModelError(TWO_DIMENSIONS)
            for layer in self.packed:
                if isinstance(layer, DenseLayer):
                    layer.padding = None if mask is None else mask.bool()
        if not self.captured:
            self.news.receive()
        self.running, self.before = True, self.length
        if self.before == 0:
            self.model_dtype = _dtype_of(decoder)

    def first_needed(self, ledger: Ledger) -> int:
        """The oldest token whose entry some layer still reads."""
        return min(layer.store.first for layer in self.packed if layer.ledger is ledger)

    def _is_as_before(self) -> bool:
        """Whether a call that failed has left no trace: it was refused before anything was stored."""
        return len(self.packed) == len(self.layers) and all(layer.store.length == self.before for layer in self.packed)

    def finish(self) -> None:
        """Called when the language model has run to its end."""
        self.running = False
        if not self.captured:
            self.news.send(self.tallies())

    def tallies(self) -> list[Tally]:
        """Where a GPU counts what its layers find."""
        return [tally for layer in self.packed for tally in steps.tallies(layer.store)]

    def save(self, path: str | Path, token_ids: Tensor | None = None) -> None:
        """Write what is held to one file, still packed; token_ids [batch, tokens], if given, let `load` check the prompt.

        Raises CacheUseError while empty, OutputError where writing fails.
        """
        save_cache(self, path, token_ids)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        source: Calibration | Recipe | str,
        *,
        token_ids: Tensor | None = None,
        **options: Any,
    ) -> "PackedCache":
        """A cache from a file, for the model and the calibration or recipe that it was saved with; options as of the class.

        Raises FileFormatError where the file is missing, damaged or of another version, CalibrationError where it belongs
        to another model, recipe or calibration, CacheUseError where it holds another prompt than token_ids.
        """
        cache = cls(model, source, **options)
        load_cache(cache, path, token_ids)
        return cache

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys that are held; the model's before the first token."""
        dtypes = self.packed[0].store.dtypes
        return dtypes[0] if dtypes else self.model_dtype

    @property
    def length(self) -> int:
        """Tokens of each sequence, padding included."""
        return self.packed[0].store.length

    def reset(self) -> None:
        """Forget all tokens."""
        decoder: Any = self.decoder()
        fresh = own_layers(decoder.config) if len(self.packed) < len(self.layers) else []
        self.layers = [layer if i in self.modules else fresh[i] for i, layer in enumerate(self.layers)]
        for layer in self.packed:
            layer.reset()
        for ledger in self.ledgers.values():
            ledger.reset()
        self.running, self.news = False, steps.News()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; `tokens_to_remove` is negative or 0, as transformers has it. Nothing is re-encoded.

        Raises CacheUseError, and drops nothing, where a layer cannot go back: a sliding window has forgotten what the next
        token would need, or a layer without attention keeps no record of its past (assisted decoding lets it).
        """
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
        for ledger in self.ledgers.values():
            ledger.crop(self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue the sequence of row beam_idx[i]; sealed blocks are shared, not copied."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        for ledger in self.ledgers.values():
            ledger.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences named by `indices` [n] int64, in that order, repeats allowed."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, neighbours together."""
        self.reorder_cache(torch.arange(max(self.batch_size, 0), dtype=torch.int64, device="cpu").repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first token."""
        shape = self.packed[0].store.shape
        return shape[0] if shape else -1

    def tensors(self) -> list[Tensor]:
        """Everything that is held: packed blocks, scales, outliers, tails, sinks, windows, positions, tables."""
        found = [tensor for ledger in self.ledgers.values() for tensor in ledger.tensors()]
        for layer in self.packed:
            found += [*layer.store.tensors(), *tables_for(layer.store)]
            found += [table for quantizer in layer.store.quantizers for table in quantizer.tensors().values()]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all of it, shared tensors counted once."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors()}
        return sum(storages.values())

    @property
    def numbers(self) -> int:
        """How many key and value numbers are held, padding included, those that sliding windows have left behind not."""
        total = 0
        for layer in self.packed:
            batch, heads, dim = layer.store.shape or (0, 0, 0)
            total += 2 * batch * heads * dim * (layer.store.length - layer.store.first)
        return total

    @property
    def bits_per_element(self) -> float:
        """Allocated bits for each number held; nan while empty."""
        return 8 * self.nbytes / self.numbers if self.numbers else float("nan")

    def __repr__(self) -> str:
        held = f"{self.length} tokens x {max(self.batch_size, 0)}"
        return f"PackedCache({self.recipe.name}, {held}, {self.nbytes:,} bytes, backend {self.backend})"


def _dtype_of(decoder: torch.nn.Module) -> torch.dtype:
    """That of the first weights of a language model that are floating point."""
    return next((part.dtype for part in decoder.parameters() if part.is_floating_point()), torch.float32)
