"""From transformers' DynamicCache to a packed cache and back, so that no prompt is read twice."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from narrowkv.attention import Rope, StoredRope
from narrowkv.errors import CacheUseError
from narrowkv.integrations.layer import PackedLayer
from narrowkv.integrations.running import RunningCache, dtype_of
from narrowkv.integrations.versions import keeps_nothing
from narrowkv.store.late import begin_late

TOGETHER = 2048  # tokens rotated back at a time, in float64
NO_ANGLES = (
    "This model's rotary embedding rotates keys by angles that a DynamicCache does not keep (they change with the length, or "
    "a "
    "token has several positions), and the recipe needs them; let the model read the prompt, or take a recipe with -postrope."
)
OWN = "fill one by this model."
NO_MODEL = "The model that this cache was made for is gone; keep it as long as the cache."


def take_dynamic(cache: RunningCache, given: Any, mask: Tensor | None, positions: Tensor | None) -> None:
    """Fill a new packed cache with the contents of a DynamicCache of its model.

    mask: [batch, tokens], 1 for tokens and 0 for padding, None where there is none. positions: [1 or batch, tokens]; by
    default those that `generate` counts by the mask. Raises CacheUseError where these do not go together.
    """
    batch, tokens = _require_stored(cache, given)
    if tokens == 0:
        return
    valid = None if mask is None else _checked(mask, "An attention mask", [(batch, tokens)]).bool().to(cache.device)
    if positions is None:
        counted = torch.ones(1, tokens, dtype=torch.bool, device=cache.device) if valid is None else valid
        positions = (counted.long().cumsum(1) - 1).clamp(min=0)
    positions = _checked(positions, "Positions", [(1, tokens), (batch, tokens)]).to(cache.device).expand(batch, -1)
    if any(isinstance(layer.rope, StoredRope) and layer.position_buffer for layer in cache.packed):
        raise CacheUseError(NO_ANGLES)
    decoder = cache.decoder()
    assert decoder is not None
    cache.model_dtype = dtype_of(decoder)
    cache.follow(decoder)
    for position_buffer in cache.position_buffers.values():
        position_buffer.append(positions)
    for i in _others(cache):
        cache.layers[i] = copy.deepcopy(given.layers[i])
    for i, layer in zip(cache.modules, cache.packed, strict=True):
        _fill(layer, given.layers[i], valid, positions, cache.device)


def to_dynamic(cache: RunningCache) -> DynamicCache:
    """A DynamicCache with the contents of a packed cache, dequantized, keys rotated, in the dtypes in which they came.

    Raises CacheUseError where the cache's model is gone.
    """
    cache.hold.require()
    decoder: Any = cache.decoder()
    if decoder is None:
        raise CacheUseError(NO_MODEL)
    found = DynamicCache(config=decoder.config)
    for i in range(len(cache.layers)):
        if i not in cache.modules:
            found.layers[i] = copy.deepcopy(cache.layers[i])
    for i, layer in zip(cache.modules, cache.packed, strict=True):
        if layer.store.length:
            own: Any = found.layers[i]
            own.update(*_decoded(layer))
            if isinstance(own, DynamicSlidingWindowLayer):
                own.cumulative_length = layer.store.length
    return found


def _decoded(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values of all tokens of a layer, [batch, kv_heads, tokens, head_dim] each."""
    store = layer.store
    keys, values = store.read()
    if layer.rotates_on_read and layer.position_buffer:
        keys = layer.rotate(keys, layer.position_buffer.read(store.first, store.length), torch.float32)
    assert store.dtypes is not None
    return keys.to(store.dtypes[0]), values.to(store.dtypes[1])


def _fill(layer: PackedLayer, given: Any, valid: Tensor | None, positions: Tensor, device: torch.device) -> None:
    """Store the contents of one layer of a DynamicCache. valid, positions: [batch, tokens]."""
    keys, values = given.keys.detach().to(device), given.values.detach().to(device)
    missing = positions.shape[1] - keys.shape[2]
    if layer.rotates_on_read and isinstance(layer.rope, Rope):
        chunks = zip(keys.split(TOGETHER, 2), positions[:, missing:].split(TOGETHER, 1), strict=True)
        keys = torch.cat([layer.rope.unrotate(*chunk).to(keys.dtype) for chunk in chunks], 2)
    if missing:
        begin_late(layer.store, keys, values, missing, valid)
    else:
        layer.store.append(keys, values, None if valid is None or valid.all() else valid)
    layer.evict()


def _require_stored(cache: RunningCache, given: Any) -> tuple[int, int]:
    """Number of sequences and tokens; raises CacheUseError where this is no DynamicCache of the cache's model."""
    if not isinstance(given, DynamicCache):
        raise CacheUseError(
            f"A DynamicCache of transformers is wanted, not a {type(given).__name__}; let the model read the prompt into one."
        )
    if not any(layer.get_seq_length() for layer in given.layers if isinstance(layer, DynamicLayer)):
        return 0, 0
    if len(given.layers) > len(cache.layers):
        raise CacheUseError(f"This DynamicCache has {len(given.layers)} layers, the model {len(cache.layers)}; {OWN}")
    layers = [*given.layers, *[None] * (len(cache.layers) - len(given.layers))]
    for i in _others(cache):
        if type(layers[i]) is not type(cache.layers[i]):
            kind = type(cache.layers[i]).__name__
            raise CacheUseError(f"Layer {i} of this DynamicCache is no {kind}, which the model's is; {OWN}")
    info = zip(cache.modules, cache.packed, cache.shapes, strict=True)
    sizes = {_size(i, layers[i], layer, shape) for i, layer, shape in info}
    if len(sizes) > 1:
        raise CacheUseError(f"The layers of this DynamicCache differ in their sequences or tokens; {OWN}")
    return sizes.pop()


def _others(cache: RunningCache) -> list[int]:
    """Layers that keep a state of their own besides keys and values."""
    return [i for i, layer in enumerate(cache.layers) if i not in cache.modules and not keeps_nothing(layer)]


def _size(i: int, given: Any, layer: PackedLayer, shape: tuple[int, int]) -> tuple[int, int]:
    """Sequences and tokens of layer i of a DynamicCache; raises CacheUseError where the model's layer cannot go on from it."""
    if type(given) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise CacheUseError(f"Layer {i} of this DynamicCache is no layer of plain keys and values; {OWN}")
    keys, values = given.keys, given.values
    heads, dim = shape
    if keys is None or keys.shape != values.shape or keys.dim() != 4 or (keys.shape[1], keys.shape[3]) != shape:
        stored = "nothing" if keys is None else f"keys {list(keys.shape)}"
        raise CacheUseError(f"Layer {i} of this DynamicCache has {stored}, the model has {heads} KV heads of {dim}; {OWN}")
    tokens = given.get_seq_length()
    if keys.shape[2] < min(tokens, (layer.sliding_window or tokens + 1) - 1):
        raise CacheUseError(f"Layer {i} of this DynamicCache has evicted tokens that the model's layer sees; {OWN}")
    return keys.shape[0], tokens


def _checked(given: Any, what: str, shapes: list[tuple[int, int]]) -> Tensor:
    """A tensor of integers or bools; raises CacheUseError where it is none, or of another shape."""
    if not isinstance(given, Tensor) or given.is_floating_point() or tuple(given.shape) not in shapes:
        found = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise CacheUseError(f"{what} of integers {list(shapes[-1])} goes with this DynamicCache, not {found}.")
    return given
