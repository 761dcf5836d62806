"""PackedCache: a drop-in `past_key_values` for transformers that stores keys and values packed."""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from narrowkv.attention import BACKENDS, Rope
from narrowkv.calibration import Calibration, Fingerprint
from narrowkv.errors import CacheUseError, RecipeError, UnsupportedModelError
from narrowkv.integrations.disk import load_cache, save_cache
from narrowkv.integrations.interface import ANOTHER_MODEL, InterceptingCache, Step, model_attention, prepare, require_step
from narrowkv.methods import Recipe, get_recipe
from narrowkv.store import LayerStore, Ledger


class PackedLayer(CacheLayerMixin):
    """One layer of a PackedCache."""

    is_sliding = False

    def __init__(self, store: LayerStore, ledger: Ledger, rope: Rope | None, backend: str, strict: bool):
        super().__init__()
        self.store = store
        self.ledger = ledger
        self.rope = rope
        self.backend = backend
        self.strict = strict
        # whether `crop` leaves no trace: tokens that have left an exact window cannot become exact again
        self.is_croppable = store.window == 0
        self.step: Step | None = None

    @property
    def is_exact(self) -> bool:
        """Whether numbers are stored as the model's own attention wants them: not quantised, and keys rotated."""
        schemes = [quantizer.scheme for quantizer in self.store.quantizers]
        return all(scheme.datatype == "exact" for scheme in schemes) and not schemes[0].pre_rope

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x: [batch, heads, new, head_dim] as the model's layer does, in the dtype of x."""
        return self.rope.rotate(x, positions) if self.rope else x

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        """Store new tokens; key_states and value_states: [batch, kv_heads, new, head_dim], keys unrotated."""
        step, self.step = require_step(self.step), None
        self.lazy_initialization(key_states, value_states)
        past = self.store.length
        stored = key_states if self.store.quantizers[0].scheme.pre_rope else self.rotate(key_states, step.positions)
        new = key_states.shape[2]
        if self.ledger.length not in (past, past + new):
            raise CacheUseError(
                "An earlier call failed half-way and left the layers unequal; call cache.reset() and start again."
            )
        self.store.append(stored, value_states, step.valid(past, new))
        if self.ledger.length == past:
            self.ledger.append(step.positions.expand(key_states.shape[0], -1))
        handle = PackedHandle(self, step, past, key_states, value_states)
        return handle, handle

    def get_seq_length(self) -> int:
        return self.store.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.length + query_length, 0

    def reset(self) -> None:
        self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; `tokens_to_remove` is negative or 0, as transformers has it."""
        if tokens_to_remove > 0:
            raise CacheUseError(f"crop takes minus the number of tokens to drop, not {tokens_to_remove}.")
        self.store.crop(max(self.store.length + tokens_to_remove, 0))

    def offload(self) -> None:
        raise UnsupportedModelError("A packed cache is not offloaded; keep it on the model's device, or choose fewer bits.")

    prefetch = offload


@dataclass(frozen=True)
class PackedHandle:
    """The new tokens of one layer and the cache that they have joined.

    past: tokens stored before them. keys (unrotated), values: [batch, kv_heads, new, head_dim].
    """

    layer: PackedLayer
    step: Step
    past: int
    keys: Tensor
    values: Tensor

    def attend(self, module: nn.Module, query: Tensor, scaling: float, **kwargs: Any) -> Tensor:
        """Attention for query [batch, query_heads, new, head_dim], unrotated; returns [batch, new, query_heads, head_dim].

        Exact recipes, and a first chunk that attends to itself alone, use the model's own attention; everything else the
        cache's backend.
        """
        layer, step = self.layer, self.step
        if layer.is_exact or (self.past == 0 and not layer.strict):
            rotated = layer.rotate(query, step.positions)
            keys, values = layer.store.read() if layer.is_exact else (layer.rotate(self.keys, step.positions), self.values)
            output, _ = model_attention(module, rotated, keys, values, step.mask, scaling=scaling, **kwargs)
            return output
        precise = torch.promote_types(query.dtype, torch.float32)
        new = None if layer.strict else (layer.rotate(self.keys.to(precise), step.positions), self.values)
        past = layer.store.length if layer.strict else self.past
        output = BACKENDS[layer.backend](
            layer.rotate(query.to(precise), step.positions),
            layer.store,
            past=past,
            new=new,
            rope=layer.rope if layer.store.quantizers[0].scheme.pre_rope else None,
            positions=layer.ledger.read(past),
            padding=step.mask.padding,
            scaling=scaling,
            sliding_window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sink_logits=kwargs.get("s_aux"),
        )
        return output.to(query.dtype).transpose(1, 2).contiguous()


class PackedCache(InterceptingCache):
    """The keys and values of one batch of running sequences, stored in few bits.

    model: a transformers model, which is made ready for the cache on the way. source: a Calibration for this model, or a
    calibration-free Recipe or its name. strict: new tokens too are attended to as they are stored (how papers measure
    perplexity); otherwise a chunk attends to itself exactly and to the packed past. backend: which attention runs.

    Raises UnsupportedModelError, RecipeError or CalibrationError where the three do not fit together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Calibration | Recipe | str,
        *,
        strict: bool = False,
        backend: str = "naive",
    ):
        facts = prepare(model)
        self.dtype = model.dtype
        self.fingerprint = Fingerprint.of(model)
        if isinstance(source, Calibration):
            source.fingerprint.check(self.fingerprint)
            self.recipe = source.recipe
        else:
            source = self.recipe = get_recipe(source)
        if backend not in BACKENDS:
            raise RecipeError(f"There is no backend {backend!r}; there is {', '.join(BACKENDS)}.")
        if any(not 0 <= layer < len(facts) for layer in self.recipe.layers):
            raise RecipeError(
                f"Recipe {self.recipe.name} names layers {sorted(self.recipe.layers)}; the model has 0 to {len(facts) - 1}."
            )
        self.backend = backend
        self.ledger = Ledger()
        layers: list[PackedLayer] = []
        for i, layer in enumerate(facts):
            keys, values = (quantizer.to(model.device) for quantizer in source.quantizers(i))
            rope = layer.rope.to(model.device) if layer.rope else None
            store = LayerStore(keys, values, self.recipe.sinks, self.recipe.window)
            layers.append(PackedLayer(store, self.ledger, rope, backend, strict))
        super().__init__(layers=list(layers))
        self.packed = layers
        self.modules = [weakref.ref(layer.module) for layer in facts]

    def begin(self, module: Any, step: Step) -> None:
        """Called before each attention module runs; raises CacheUseError if it is another model's."""
        if self.modules[int(module.layer_idx)]() is not module:
            raise CacheUseError(ANOTHER_MODEL)
        super().begin(module, step)

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

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.ledger.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; `tokens_to_remove` is negative or 0, as transformers has it. Nothing is re-encoded."""
        super().crop(tokens_to_remove)
        self.ledger.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue the sequence of row beam_idx[i]; sealed blocks are shared, not copied."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, neighbours together."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences named by `indices` [n] int64, in that order, repeats allowed."""
        for layer in self.packed:
            layer.store.select(indices)
        self.ledger.select(indices)

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first token."""
        shape = self.packed[0].store.shape
        return shape[0] if shape else -1

    def tensors(self) -> list[Tensor]:
        """Everything that is held: packed blocks, scales, outliers, tails, sinks, windows, positions, tables."""
        found = self.ledger.tensors()
        for layer in self.packed:
            found += layer.store.tensors()
            found += [table for quantizer in layer.store.quantizers for table in quantizer.tensors().values()]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all of it, shared tensors counted once."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors()}
        return sum(storages.values())

    @property
    def numbers(self) -> int:
        """How many key and value numbers are held, padding included."""
        total = 0
        for layer in self.packed:
            batch, heads, dim = layer.store.shape or (0, 0, 0)
            total += 2 * batch * heads * dim * layer.store.length
        return total

    @property
    def bits_per_element(self) -> float:
        """Allocated bits for each number held; nan while empty."""
        return 8 * self.nbytes / self.numbers if self.numbers else float("nan")

    def __repr__(self) -> str:
        held = f"{self.get_seq_length()} tokens x {max(self.batch_size, 0)}"
        return f"PackedCache({self.recipe.name}, {held}, {self.nbytes:,} bytes, backend {self.backend})"
