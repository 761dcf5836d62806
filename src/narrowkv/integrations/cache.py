"""PackedCache: a drop-in `past_key_values` for transformers that stores keys and values packed."""

import copy
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from narrowkv.attention import AUTO, BACKENDS, StoredRope, chosen, cpu, described
from narrowkv.attention.cuda_blocks import tables_for
from narrowkv.calibration import Calibration, Fingerprint
from narrowkv.calibration.processes import tensor_parallel_rank
from narrowkv.calibration.wrappers import decoder_of, unwrapped
from narrowkv.codec import AnyQuantizer
from narrowkv.codec.surroundings import runs_undisturbed, undisturbed
from narrowkv.defaults import DENSE
from narrowkv.errors import CacheUseError, RecipeError
from narrowkv.integrations.dense import DenseLayer
from narrowkv.integrations.disk import load_cache, save_cache
from narrowkv.integrations.exchange import take_dynamic, to_dynamic
from narrowkv.integrations.frequencies import frequencies, place_of
from narrowkv.integrations.layer import PackedLayer
from narrowkv.integrations.preparation import facts_for
from narrowkv.integrations.probe import AttentionFacts, own_layers, text_config
from narrowkv.integrations.projections import bias_of, with_gain
from narrowkv.integrations.running import RunningCache, dtype_of
from narrowkv.methods import Recipe, get_recipe
from narrowkv.store import LayerStore, Ledger
from narrowkv.store.checks import as_count, as_rows


class PackedCache(RunningCache):
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
        stored = any(isinstance(fact.rope, StoredRope) for fact in facts.attention)
        backend = chosen(backend, model.device, model.dtype, self.recipe.every_scheme(), biased, stored)
        self.model_dtype = dtype_of(decoder_of(model))  # when the first tokens came; until then, at the creation
        self.fingerprint = Fingerprint.of(model)
        if isinstance(source, Calibration):
            source.fingerprint.check(self.fingerprint)
        words = backend == "cpu" and cpu.may_round(model.dtype) and self._in_words(facts.attention)
        self.backend = described(backend, words)
        self.dense = backend == DENSE
        self.device = model.device
        self.strict = strict
        self.ledgers: dict[str, Ledger] = {}
        self.packed: list[PackedLayer] = []
        layers, rank = own_layers(text_config(model)), tensor_parallel_rank(model)
        for fact in facts.attention:
            with undisturbed():
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
        known = frequencies(decoder_of(model))
        self.places = [place_of(layer.rope, known) for layer in self.packed]  # where in the model their frequencies are

    def _in_words(self, facts: Sequence[AttentionFacts]) -> bool:
        """Whether words of 16 bits can be read from all layers."""
        layers = [(self.recipe.schemes(fact.layer), fact) for fact in facts]
        return all(cpu.in_words(schemes.keys, schemes.values, fact.head_dim, fact.rope) for schemes, fact in layers)

    def _layer(
        self, fact: AttentionFacts, quantizers: tuple[AnyQuantizer, AnyQuantizer], own: Any, backend: str, strict: bool
    ) -> PackedLayer:
        keys, values = quantizers
        keys, values = (quantizer.to(self.device) for quantizer in (with_gain(keys, fact.constants), values))
        for quantizer in (keys, values):
            quantizer.scheme.require_head_dim(fact.head_dim)
        rope = fact.rope.to(self.device) if fact.rope else None
        bias = bias_of(fact.constants, rope, keys.scheme, values.scheme, self.device)
        recorded = rope is not None and (keys.scheme.pre_rope or bias.turns)
        ledger = self.ledgers.setdefault(rope.record, Ledger()) if rope and recorded else None
        bias.ledger = ledger if bias.turns else None
        store = LayerStore(keys, values, self.recipe.sinks, self.recipe.window, bias)
        kind = DenseLayer if self.dense else PackedLayer
        return kind(store, rope, ledger, backend, strict, getattr(own, "sliding_window", None))

    @runs_undisturbed
    def follow(self, decoder: torch.nn.Module) -> None:
        known = frequencies(decoder)
        for layer, place in zip(self.packed, self.places, strict=True):
            if place is not None:
                layer.turn_by(known[place][0].to(self.device))

    @runs_undisturbed
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
        with undisturbed():
            load_cache(cache, path, token_ids)
        return cache

    @classmethod
    def from_cache(
        cls,
        model: PreTrainedModel,
        source: Calibration | Recipe | str,
        dynamic_cache: DynamicCache,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> "PackedCache":
        """A cache with what the model has read into transformers' DynamicCache, from which generation goes on.

        attention_mask: [batch, tokens], 0 for padding, where some of them are. position_ids: [1 or batch, tokens], where they
        are not those that `generate` counts by the mask. options: as of the class. Keys that are stored before the rotary
        embedding are turned back. Raises CacheUseError where the cache is of another kind or not one of this model's, or where
        it takes angles to turn keys back that a DynamicCache does not keep; else as the class.
        """
        cache = cls(model, source, **options)
        with undisturbed():
            take_dynamic(cache, dynamic_cache, attention_mask, position_ids)
        return cache

    @runs_undisturbed
    def to_dynamic(self) -> DynamicCache:
        """What is held as transformers' DynamicCache: decoded, keys turned by the rotary embedding, in the dtypes that came.

        Raises CacheUseError where the model is gone.
        """
        return to_dynamic(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys that are held; the model's before the first token."""
        dtypes = self.packed[0].store.dtypes
        return dtypes[0] if dtypes else self.model_dtype

    @runs_undisturbed
    def reset(self) -> None:
        """Forget all tokens; raises CacheUseError while another thread uses the cache."""
        self.hold.require()
        self.settle()
        decoder: Any = self.decoder()
        fresh = own_layers(decoder.config) if len(self.packed) < len(self.layers) else []
        self.layers = [layer if i in self.modules else fresh[i] for i, layer in enumerate(self.layers)]
        for layer in self.packed:
            layer.reset()
        for ledger in self.ledgers.values():
            ledger.reset()

    @runs_undisturbed
    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; `tokens_to_remove` is negative or 0, as transformers has it. Nothing is re-encoded.

        Raises CacheUseError, and drops nothing, where a layer cannot go back: a sliding window has forgotten what the next
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
        for ledger in self.ledgers.values():
            ledger.crop(self.length)

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
        for ledger in self.ledgers.values():
            ledger.select(rows)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences named by `indices`, repeats allowed, or those that bools keep; raises as `reorder_cache`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, neighbours together; raises CacheUseError where `repeats` is no whole number from 1."""
        repeats = as_count(repeats, "How often sequences are repeated")
        if repeats < 1:
            raise CacheUseError(f"Sequences are repeated once or more, not {repeats} times.")
        self.reorder_cache([row for row in range(self.batch_size) for _ in range(repeats)])

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedCache":
        """A cache of its own, which shares sealed blocks; of the model's copy, if that was made before in the same copying."""
        self.hold.require()
        memo[id(self)] = copied = type(self).__new__(type(self))
        with undisturbed():
            vars(copied).update({name: copy.deepcopy(part, memo) for name, part in vars(self).items()})
        copied.decoder = _copied(self.decoder, memo)
        copied.modules = {layer: _copied(module, memo) for layer, module in self.modules.items()}
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheUseError(
            "A packed cache is not pickled: use cache.save(path) and PackedCache.load(path, model, source), or, within a "
            "process, copy.deepcopy(cache)."
        )

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


def require_packed(cache: Any) -> None:
    """Raise CacheUseError where something else is given for a packed cache."""
    if not isinstance(cache, PackedCache):
        raise CacheUseError(f"A packed cache is wanted, not a {type(cache).__name__}; make one: PackedCache(model, source).")


def _copied(module: weakref.ref[torch.nn.Module], memo: dict[int, Any]) -> weakref.ref[torch.nn.Module]:
    """A module's copy, if one was made; a cache may outlive its model."""
    found = module()
    return module if found is None else weakref.ref(memo.get(id(found), found))
