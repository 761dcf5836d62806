"""PackedCache: a drop-in `past_key_values` for transformers that stores quantized keys and values."""

import copy
import json
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from narrowkv.attention import AUTO, BACKENDS, StoredRope, describe_backend, resolve_backend
from narrowkv.attention.cpu import decode as cpu
from narrowkv.attention.cuda.block_table import tables_for
from narrowkv.calibration import Calibration, Fingerprint
from narrowkv.calibration.distributed import tensor_parallel_rank
from narrowkv.calibration.wrappers import decoder_of, unwrapped
from narrowkv.codec import AnyQuantizer
from narrowkv.codec.surroundings import runs_undisturbed, undisturbed
from narrowkv.defaults import DENSE
from narrowkv.errors import CacheUseError, FileFormatError, RecipeError
from narrowkv.integrations.dense import DenseLayer
from narrowkv.integrations.exchange import take_dynamic, to_dynamic
from narrowkv.integrations.frequencies import frequencies, module_index
from narrowkv.integrations.layer import PackedLayer
from narrowkv.integrations.preparation import model_info_for
from narrowkv.integrations.probe import AttentionLayerInfo, own_layers, text_config
from narrowkv.integrations.projections import bias_of, with_gain
from narrowkv.integrations.running import RunningCache, dtype_of
from narrowkv.integrations.serialization import CacheState, read_state, tensors_checksum, write_state
from narrowkv.integrations.versions import keeps_nothing
from narrowkv.methods import Recipe, get_recipe
from narrowkv.store import LayerStore, PositionBuffer


class PackedCache(RunningCache):
    """Quantized keys and values of one batch of sequences, for use as `past_key_values`.

    model: a transformers model. Creating a cache sets hooks on its attention modules. Layers without attention (linear,
    convolution) store their own state in the cache. source: a Calibration of this model, or a recipe that needs none, or its
    name. strict: attend to new tokens as they are stored, as papers measure perplexity; by default a chunk attends exactly to
    itself and to the packed past.

    backend: the attention implementation. `cpu`: compiled kernels that read packed blocks, for up to 16 tokens at a time, and
    `torch` for prefill. `cuda`: Triton kernels. `torch`: dequantizes tile by tile. `naive`: dequantizes all tokens at once.
    `dense`: passes dequantized tensors to models that compute attention themselves. `auto`: `cpu` or `cuda` if it supports
    device and recipe, otherwise `torch`. `cache.backend` names the choice.

    Raises UnsupportedModelError, RecipeError or CalibrationError if model, source and backend do not go together.
    """

    layer_kind: ClassVar[type[PackedLayer]] = PackedLayer

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
        info = model_info_for(model, backend, [self.recipe])
        biased = any(
            part is not None
            for layer_info in info.attention
            for part in (layer_info.constants.keys, layer_info.constants.values)
        )
        stored = any(isinstance(layer_info.rope, StoredRope) for layer_info in info.attention)
        backend = resolve_backend(backend, model.device, model.dtype, self.recipe.every_scheme(), biased, stored)
        self.model_dtype = dtype_of(decoder_of(model))  # when the first tokens came; until then, at the creation
        self.fingerprint = Fingerprint.of(model)
        if isinstance(source, Calibration):
            source.fingerprint.check(self.fingerprint)
        int16 = backend == "cpu" and cpu.allows_int16(model.dtype) and self._uses_int16(info.attention)
        self.dense = backend == DENSE
        self.device = model.device
        self.strict = strict
        self.position_buffers: dict[str, PositionBuffer] = {}
        self.packed: list[PackedLayer] = []
        layers, rank = own_layers(text_config(model)), tensor_parallel_rank(model)
        for layer_info in info.attention:
            with undisturbed():
                if isinstance(source, Calibration):
                    quantizers = source.for_heads(layer_info.layer, layer_info.kv_heads, layer_info.head_dim, rank)
                else:
                    quantizers = self.recipe.quantizers(layer_info.layer)
                layers[layer_info.layer] = self._layer(layer_info, quantizers, layers[layer_info.layer], backend, strict)
            self.packed.append(layers[layer_info.layer])
        super().__init__(layers=layers)
        self.backend = describe_backend(backend, int16, self._encoded_in_torch())
        self.shapes = [(layer_info.kv_heads, layer_info.head_dim) for layer_info in info.attention]
        self.rank = rank
        self.decoder = weakref.ref(decoder_of(model))
        self.modules = {layer_info.layer: weakref.ref(layer_info.module) for layer_info in info.attention}
        known = frequencies(decoder_of(model))
        self._modules = [module_index(layer.rope, known) for layer in self.packed]  # that have their frequencies

    def _encoded_in_torch(self) -> list[str]:
        """Which of keys and values are encoded in plain torch, in any layer."""
        sides = zip(*(layer.store.quantizers for layer in self.packed), strict=True)
        slow = (any(quantizer.encodes_in_torch(self.device) for quantizer in side) for side in sides)
        return [name for name, found in zip(("keys", "values"), slow, strict=True) if found]

    def _uses_int16(self, info: Sequence[AttentionLayerInfo]) -> bool:
        """Whether the int16 kernels support all layers."""
        layers = [(self.recipe.schemes(each.layer), each) for each in info]
        return all(cpu.uses_int16(pair.keys, pair.values, each.head_dim, each.rope) for pair, each in layers)

    def _layer(
        self, info: AttentionLayerInfo, quantizers: tuple[AnyQuantizer, AnyQuantizer], own: Any, backend: str, strict: bool
    ) -> PackedLayer:
        keys, values = quantizers
        keys, values = (quantizer.to(self.device) for quantizer in (with_gain(keys, info.constants), values))
        for quantizer in (keys, values):
            quantizer.scheme.require_head_dim(info.head_dim)
        rope = info.rope.to(self.device) if info.rope else None
        bias = bias_of(info.constants, rope, keys.scheme, values.scheme, self.device)
        recorded = rope is not None and (keys.scheme.transform.pre_rope or bias.depends_on_position)
        position_buffer = self.position_buffers.setdefault(rope.record, PositionBuffer()) if rope and recorded else None
        bias.position_buffer = position_buffer if bias.depends_on_position else None
        store = LayerStore(keys, values, self.recipe.sinks, self.recipe.residual_length, bias)
        kind = DenseLayer if self.dense else self.layer_kind
        return kind(store, rope, position_buffer, backend, strict, getattr(own, "sliding_window", None))

    @runs_undisturbed
    def follow(self, decoder: torch.nn.Module) -> None:
        known = frequencies(decoder)
        for layer, index in zip(self.packed, self._modules, strict=True):
            if index is not None:
                layer.set_frequencies(known[index][0].to(self.device))

    def save(self, path: str | Path, token_ids: Tensor | None = None) -> None:
        """Write the packed cache to one file.

        token_ids: [batch, tokens] of the prompt; if given, `load` can check that the prompt is the same. Raises CacheUseError
        if the cache is empty, OutputError if writing fails.
        """
        write_state(self.state(token_ids), Path(path))

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
        """Read a cache from a file.

        model, source: the model and the calibration or recipe that it was saved with. token_ids: [batch, tokens], the expected
        prompt. options: those of the class. Raises FileFormatError if the file is missing, damaged or of another version,
        CalibrationError if it belongs to another model, recipe or calibration, CacheUseError if its prompt is not token_ids.
        """
        state = read_state(Path(path))
        try:
            return cls.from_state(state, model, source, token_ids=token_ids, **options)
        except FileFormatError as error:
            raise FileFormatError(
                f"{path} cannot be loaded: {error}; read the prompt again and save the cache anew."
            ) from error

    @runs_undisturbed
    def state(self, token_ids: Tensor | None = None) -> CacheState:
        """The packed cache as plain data, in memory of its own; token_ids: like those of `save`.

        Raises CacheUseError if the cache is empty, if token_ids do not match, or if layers without attention have a state.
        """
        self.hold.require()
        if self.length == 0:
            raise CacheUseError("The cache is empty, there is nothing to save; let the model read a prompt first.")
        self._require_attention_only()
        state = CacheState(self._origin() | {"batch": self.batch_size, "tokens": self.length})
        state.name_prompt(token_ids)
        for name, position_buffer in self.position_buffers.items():
            state.add_positions(name, position_buffer)
        for i, layer in zip(self.modules, self.packed, strict=True):
            state.add_layer(i, layer.store)
        return state

    @classmethod
    def from_state(
        cls,
        state: CacheState,
        model: PreTrainedModel,
        source: Calibration | Recipe | str,
        *,
        token_ids: Tensor | None = None,
        **options: Any,
    ) -> "PackedCache":
        """A cache from the `state` of another one; token_ids, options and errors like those of `load`."""
        cache = cls(model, source, **options)
        with undisturbed():
            state.require_origin(cache._origin(), token_ids)
            reader = state.reader(cache.device)
            for i, layer, shape in zip(cache.modules, cache.packed, cache.shapes, strict=True):
                reader.take_layer(i, layer.store, shape, layer.sliding_window)
            for name, position_buffer in cache.position_buffers.items():
                dims = [
                    dim
                    for layer, (_, dim) in zip(cache.packed, cache.shapes, strict=True)
                    if layer.position_buffer is position_buffer
                ]
                reader.take_positions(name, position_buffer, min(dims), cache.first_needed(position_buffer))
            reader.require_empty()
        return cache

    def _origin(self) -> dict[str, Any]:
        """What a state belongs to, as plain data: only a cache with the same origin can take it."""
        quantizers = [quantizer for layer in self.packed for quantizer in layer.store.quantizers]
        biases = [part for layer in self.packed for part in layer.store.bias.tensors()]
        return {
            "recipe": json.loads(json.dumps(self.recipe.settings())),  # lists, as a file has them
            "tables_sha256": tensors_checksum(table for one in quantizers for table in one.tensors().values()),
            "bias_sha256": tensors_checksum(biases) if biases else None,
            "fingerprint": asdict(self.fingerprint),
            "dtype": str(self.model_dtype).removeprefix("torch."),
            "rank": self.rank,
            "shapes": [list(shape) for shape in self.shapes],
        }

    def _require_attention_only(self) -> None:
        others = [i for i, layer in enumerate(self.layers) if i not in self.modules and not keeps_nothing(layer)]
        if others:
            raise CacheUseError(
                f"Layers {', '.join(map(str, others))} keep a state of their own (linear attention, convolution), which "
                "cannot be saved; read the prompt anew instead."
            )

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
        """Pack the keys and values of a DynamicCache, to continue generation from it.

        attention_mask: [batch, tokens], 0 for padding; required with padding. position_ids: [1 or batch, tokens], if they
        differ from those that `generate` counts by the mask. options: those of the class. Keys that are stored before the
        rotary embedding are rotated back. Raises CacheUseError if the cache is of another kind or model, or if rotating keys
        back needs angles that a DynamicCache does not store; otherwise like the class.
        """
        cache = cls(model, source, **options)
        with undisturbed():
            take_dynamic(cache, dynamic_cache, attention_mask, position_ids)
        return cache

    @runs_undisturbed
    def to_dynamic(self) -> DynamicCache:
        """A DynamicCache with the dequantized keys, after the rotary embedding, and values, in the dtypes of the input.

        Raises CacheUseError if the model no longer exists.
        """
        return to_dynamic(self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored keys; that of the model before the first token."""
        dtypes = self.packed[0].store.dtypes
        return dtypes[0] if dtypes else self.model_dtype

    @runs_undisturbed
    def reset(self) -> None:
        """Remove all tokens; raises CacheUseError while another thread uses the cache."""
        self.hold.require()
        self.settle()
        decoder: Any = self.decoder()
        fresh = own_layers(decoder.config) if len(self.packed) < len(self.layers) else []
        self.layers = [layer if i in self.modules else fresh[i] for i, layer in enumerate(self.layers)]
        for layer in self.packed:
            layer.reset()
        for position_buffer in self.position_buffers.values():
            position_buffer.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedCache":
        """An independent cache that shares sealed blocks; it belongs to the copy of the model, if one is in the memo."""
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
        """All stored tensors: packed blocks, scales, outliers, tails, sinks, residuals, positions, tables."""
        found = [tensor for position_buffer in self.position_buffers.values() for tensor in position_buffer.tensors()]
        for layer in self.packed:
            found += [*layer.store.tensors(), *tables_for(layer.store)]
            found += [table for quantizer in layer.store.quantizers for table in quantizer.tensors().values()]
        return found

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all stored tensors, with shared tensors counted once."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors()}
        return sum(storages.values())

    @property
    def elements(self) -> int:
        """Number of stored elements of keys and values, with padding, without tokens evicted behind sliding windows."""
        total = 0
        for layer in self.packed:
            batch, heads, dim = layer.store.shape or (0, 0, 0)
            total += 2 * batch * heads * dim * (layer.store.length - layer.store.first)
        return total

    @property
    def bits_per_element(self) -> float:
        """Allocated bits per stored element; nan if the cache is empty."""
        return 8 * self.nbytes / self.elements if self.elements else float("nan")

    def __repr__(self) -> str:
        tokens = f"{self.length} tokens x {max(self.batch_size, 0)}"
        return f"PackedCache({self.recipe.name}, {tokens}, {self.nbytes:,} bytes, backend {self.backend})"


def require_packed(cache: Any) -> None:
    """Raise CacheUseError if something else is passed than a packed cache."""
    if not isinstance(cache, PackedCache):
        raise CacheUseError(
            f"Expected a PackedCache, not a {type(cache).__name__}; create one with PackedCache(model, source)."
        )


def _copied(module: weakref.ref[torch.nn.Module], memo: dict[int, Any]) -> weakref.ref[torch.nn.Module]:
    """A module's copy, if one was made; a cache may outlive its model."""
    found = module()
    return module if found is None else weakref.ref(memo.get(id(found), found))
