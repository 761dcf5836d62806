"""PackedCache: a drop-in `past_key_values` for transformers that stores keys and values packed."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from narrowkv.attention import BACKENDS, Rope
from narrowkv.calibration import Calibration, Fingerprint
from narrowkv.errors import RecipeError, UnsupportedModelError
from narrowkv.integrations.interface import InterceptingCache, Step, model_attention, prepare, require_step
from narrowkv.integrations.support import describe
from narrowkv.methods import Recipe, get_recipe
from narrowkv.store import LayerStore, Ledger


class PackedLayer(CacheLayerMixin):
    """One layer of a PackedCache."""

    is_sliding = False

    def __init__(self, store: LayerStore, ledger: Ledger, rope: Rope, backend: str, strict: bool):
        super().__init__()
        self.store = store
        self.ledger = ledger
        self.rope = rope
        self.backend = backend
        self.strict = strict
        self.step: Step | None = None

    @property
    def is_exact(self) -> bool:
        """Whether nothing is quantised, so that the model's own attention can read what is stored."""
        return all(quantizer.scheme.datatype == "exact" for quantizer in self.store.quantizers)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        """Store new tokens; key_states and value_states: [batch, kv_heads, new, head_dim], keys unrotated."""
        step, self.step = require_step(self.step), None
        self.lazy_initialization(key_states, value_states)
        past = self.store.length
        stored = key_states if self.store.quantizers[0].scheme.pre_rope else step.rotate(key_states)
        self.store.append(stored, value_states, step.valid(key_states.shape[2]))
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

    def _not_yet(self, *args: Any) -> None:
        raise UnsupportedModelError(
            "The packed cache does not do beam search, assisted decoding or batch selection yet; use greedy decoding "
            "or sampling, or DynamicCache."
        )

    crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = _not_yet
    reorder_cache = _not_yet  # type: ignore[assignment]


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
            keys, values = layer.store.read() if layer.is_exact else (step.rotate(self.keys), self.values)
            output, _ = model_attention(module, step.rotate(query), keys, values, step.mask, scaling=scaling, **kwargs)
            return output
        positions = step.positions.expand(query.shape[0], -1)
        new = None if layer.strict else (layer.rope.rotate(self.keys, positions), self.values)
        past = layer.store.length if layer.strict else self.past
        output = BACKENDS[layer.backend](
            layer.rope.rotate(query, positions),
            layer.store,
            past=past,
            new=new,
            rope=layer.rope if layer.store.quantizers[0].scheme.pre_rope else None,
            positions=layer.ledger.read(past),
            padding=step.mask.padding,
            scaling=scaling,
            sliding_window=kwargs.get("sliding_window"),
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
        facts = describe(model)
        if isinstance(source, Calibration):
            source.fingerprint.check(Fingerprint.of(model))
            self.recipe = source.recipe
        else:
            source = self.recipe = get_recipe(source)
        if backend not in BACKENDS:
            raise RecipeError(f"There is no backend {backend!r}; there is {', '.join(BACKENDS)}.")
        if any(layer >= facts.layers for layer in self.recipe.layers):
            raise RecipeError(
                f"Recipe {self.recipe.name} names layer {max(self.recipe.layers)}; the model has {facts.layers} layers."
            )
        self.backend = backend
        self.ledger = Ledger()
        rope = Rope(facts.rope.inverse_frequencies.to(model.device), facts.rope.scaling)
        layers: list[PackedLayer] = []
        for i in range(facts.layers):
            keys, values = (quantizer.to(model.device) for quantizer in source.quantizers(i))
            store = LayerStore(keys, values, self.recipe.sinks, self.recipe.window)
            layers.append(PackedLayer(store, self.ledger, rope, backend, strict))
        super().__init__(layers=list(layers))
        self.packed = layers
        prepare(model)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.ledger.reset()

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
