"""The probe: run a model on a few tokens to find its attention modules and how each of them rotates its keys.

Nothing is known of a family beforehand. Every attention module is run twice on the same input, once with the model's own
rotary embedding and once with the identity instead; from the two results the rotation is recognized, or the model is
refused with the reason.
"""

import functools
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from narrowkv.attention import AnyRope, StoredRope
from narrowkv.attention.rope import CosSin
from narrowkv.calibration.wrappers import decoder_of
from narrowkv.codec.ranges import require_finite
from narrowkv.errors import NarrowKVError, UnsupportedModelError
from narrowkv.integrations.frequencies import STATIC_ROPE, by_position, frequencies
from narrowkv.integrations.projections import NOTHING_KNOWN, Constants, constants_of
from narrowkv.integrations.versions import CACHE, keeps_nothing

MAX_HEAD_DIM = 512  # the index of an outlier in its block has 16 bits, one of them the sign
TOKENS, FIRST_POSITION = 12, 3
TOLERANCE = 2e-2  # of the largest key: bfloat16 rounds cosine, sine and product
LAYOUTS: tuple[Any, ...] = ("halves", "repeated", "once")


@dataclass(frozen=True)
class AttentionLayerInfo:
    """One attention module that keeps keys and values: its layer, kv_heads, head_dim, how it rotates keys (None: not), what
    all its keys and values have in common, and by which name it takes a cache.
    """

    module: nn.Module
    layer: int
    kv_heads: int
    head_dim: int
    rope: AnyRope | None
    constants: Constants = NOTHING_KNOWN
    cache_argument: str = CACHE


@dataclass(frozen=True)
class Layout:
    """What the probe's findings rest on, and a user may change.

    modules: those that know their layer. layers: how many a cache has. frequencies: of rotary embeddings that never change.
    """

    modules: list[nn.Module]
    layers: int
    frequencies: list[Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Layout":
        """The layout of a model as it is now."""
        decoder = decoder_of(model)  # whatever contains it
        static = [inverse.cpu().clone() for inverse, _, kind in frequencies(decoder) if kind in STATIC_ROPE]
        modules = [module for module in decoder.modules() if hasattr(module, "layer_idx")]
        return cls(modules, len(own_layers(text_config(model))), static)

    def is_that_of(self, other: "Layout") -> bool:
        """Whether nothing has changed."""
        modules, inverses = (self.modules, other.modules), (self.frequencies, other.frequencies)
        return (
            self.layers == other.layers
            and all(len(one) == len(two) for one, two in (modules, inverses))
            and all(one is two for one, two in zip(*modules, strict=True))
            and all(one.is_meta or two.is_meta or torch.equal(one, two) for one, two in zip(*inverses, strict=True))
        )


@dataclass(frozen=True)
class ModelInfo:
    """attention: the modules that keep keys and values, by layer. readers: those that use another layer's. layout: as seen."""

    attention: list[AttentionLayerInfo]
    readers: list[nn.Module]
    layout: Layout

    def are_of(self, model: PreTrainedModel) -> bool:
        """Whether the model is still as it was."""
        return self.layout.is_that_of(Layout.of(model))

    @property
    def modules(self) -> list[nn.Module]:
        """All attention modules."""
        return [*(layer.module for layer in self.attention), *self.readers]


@dataclass
class AttentionTrace:
    """What the probe sees of one attention module: what it was given, stored and returned."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def layer(self) -> int:
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    def info(self, rope: AnyRope | None, constants: Constants = NOTHING_KNOWN) -> AttentionLayerInfo:
        """What is known of the module, given how it rotates keys."""
        name = next((name for name, part in self.kwargs.items() if isinstance(part, Cache)), CACHE)
        _, kv_heads, _, head_dim = self.keys[0].shape
        return AttentionLayerInfo(self.module, self.layer, kv_heads, head_dim, rope, constants, name)

    def run(self, running: list["AttentionTrace"], factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, tokens, head_dim] of the hidden states times a factor, without rotary embedding."""
        args, kwargs, tables = self.args, dict(self.kwargs), self.kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = identity(tables)
        if args:
            args = (args[0] * factor, *args[1:])
        else:
            kwargs["hidden_states"] = kwargs["hidden_states"] * factor
        running.append(self)
        self.module(*args, **kwargs)
        running.pop()
        return self.keys.pop(), self.values.pop()


class EmptyLayer(CacheLayerMixin):
    """A layer of a cache that stores nothing, for observers."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class _ProbeLayer(EmptyLayer):
    """Notes the keys and values of the module that is running."""

    def __init__(self, running: list[AttentionTrace], updated: dict[int, AttentionTrace]):
        super().__init__()
        self.running, self.updated = running, updated

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen = self.running[-1]
        seen.keys.append(key_states)
        seen.values.append(value_states)
        self.updated.setdefault(id(seen.module), seen)
        return key_states, value_states


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the model's language part."""
    return model.config.get_text_config(decoder=True)


def own_layers(config: Any) -> list[Any]:
    """The cache layers that transformers would use: those of attention, which a packed cache replaces, and all others."""
    return list(DynamicCache(config=config).layers)


def keeps_keys(layer: Any) -> bool:
    """Whether a packed layer can replace this one; raises UnsupportedModelError on kinds that nobody has looked at."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return True
    if type(layer) is LinearAttentionLayer or keeps_nothing(layer):
        return False
    raise UnsupportedModelError(f"Layers of the kind {type(layer).__name__} cannot be packed; use DynamicCache.")


@torch.no_grad()
def probe(model: PreTrainedModel) -> tuple[list[AttentionLayerInfo], list[AttentionTrace]]:
    """Facts of every attention module that keeps keys, by layer, and what was seen of each.

    Raises UnsupportedModelError where one of them cannot be served.
    """
    seen, running = watch(model)
    tables = {id(one.kwargs.get("position_embeddings")): one.kwargs.get("position_embeddings") for one in seen}
    names = {key: f"angles{i}" for i, key in enumerate(tables)}  # layers that are given the same tables share their record
    info = []
    for one in seen:
        rope = _rope(model, one, running, names[id(one.kwargs.get("position_embeddings"))])
        info.append(one.info(rope, constants_of(one.module, functools.partial(one.run, running))))
    return info, seen


def watch(model: PreTrainedModel) -> tuple[list[AttentionTrace], list[AttentionTrace]]:
    """Run the model once on a few tokens: what its attention modules were given and stored.

    Returns those that stored keys and values, by layer, and the list that such a module must stand in last to be run again.
    Raises UnsupportedModelError where the model does not store as a packed cache understands it.
    """
    _require_one_device(model)
    layers, running, updated = own_layers(text_config(model)), list[AttentionTrace](), dict[int, AttentionTrace]()
    expected = {i for i, layer in enumerate(layers) if keeps_keys(layer)}
    present = {vars(module)["layer_idx"] for module in decoder_of(model).modules() if "layer_idx" in vars(module)}
    expected = expected & present or expected  # layers may have been removed
    cache = Cache(layers=[_ProbeLayer(running, updated) if i in expected else layer for i, layer in enumerate(layers)])
    hooks, thread = [], threading.get_ident()

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:  # others may use the model meanwhile
            running.append(AttentionTrace(module, args, kwargs))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == thread:
            running.pop().output = output

    for module in model.modules():
        if hasattr(module, "layer_idx"):
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
    try:
        embedding: Any = model.get_input_embeddings()
        ids = torch.arange(2, 2 + TOKENS, device=model.device, dtype=torch.int64)[None] % embedding.weight.shape[0]
        positions = torch.arange(FIRST_POSITION, FIRST_POSITION + TOKENS, device=model.device, dtype=torch.int64)[None]
        decoder_of(model)(input_ids=ids, position_ids=positions, **{CACHE: cache}, use_cache=True)
    except NarrowKVError:
        raise
    except Exception as error:  # whatever a model of others may raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"This model does not run with a cache of another make ({reason}); use DynamicCache."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        running.clear()
    if not expected:
        raise UnsupportedModelError("This model has no attention layers, so there are no keys and values to pack.")
    stored = {one.layer for one in updated.values()}
    if stored != expected:
        raise UnsupportedModelError(
            f"Of {len(expected)} attention layers {len(stored & expected)} keep keys and values as the packed cache "
            "understands it; use DynamicCache."
        )
    for one in updated.values():
        _require_shapes(one)
    return sorted(updated.values(), key=lambda one: one.layer), running


def _require_one_device(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where weights are elsewhere than where the model computes, or on several devices."""
    hooks = [vars(module).get("_hf_hook") for module in model.modules()]
    if any(getattr(part, "offload", False) for hook in hooks if hook for part in getattr(hook, "hooks", (hook,))):
        raise UnsupportedModelError(
            "The model's weights are offloaded (accelerate brings them from memory or disk layer by layer), which a packed "
            "cache does not serve; load the model wholly on one device, or use DynamicCache."
        )
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UnsupportedModelError(
            "A model spread over several devices by device_map is not supported; use tensor parallelism (docs/processes.md)."
        )


def _require_shapes(seen: AttentionTrace) -> None:
    keys, values, layer = seen.keys[0], seen.values[0], seen.layer
    if not keys.is_meta:
        require_finite("On a few tokens, keys", keys)
    if keys.dim() != 4 or keys.shape[2] != TOKENS:
        raise UnsupportedModelError(f"Layer {layer} stores keys of an unknown shape {list(keys.shape)}; use DynamicCache.")
    if keys.shape[3] % 8 or keys.shape[3] > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"A head_dim of {keys.shape[3]} is not supported (multiples of 8 up to {MAX_HEAD_DIM} are); use DynamicCache."
        )
    if keys.shape != values.shape:
        raise UnsupportedModelError(
            f"Layer {layer} has keys and values of different sizes (latent attention); use DynamicCache."
        )


def identity(tables: CosSin) -> CosSin:
    """Tables of a rotary embedding that leaves everything as it is."""
    return torch.ones_like(tables) if isinstance(tables, Tensor) else (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))


def _rope(model: PreTrainedModel, seen: AttentionTrace, running: list[AttentionTrace], name: str) -> AnyRope | None:
    """How a module rotates its keys, found by running it with the identity in place of the rotary embedding."""
    tables = seen.kwargs.get("position_embeddings")
    if tables is None:
        return None
    rotated, unrotated = seen.keys[0], seen.run(running)[0]
    if torch.equal(unrotated, rotated):
        return None
    for layout in ("complex",) if isinstance(tables, Tensor) else LAYOUTS:
        for interleaved in (False, True):
            rope = StoredRope(name, layout, interleaved)
            if _makes(rope, rope.keep(None, tables), unrotated, rotated):
                return by_position(model, seen.kwargs.get("position_ids"), rope, tables) or rope
    raise UnsupportedModelError(
        f"Layer {seen.layer} rotates its keys in a way that is not known; choose backend 'dense', which dequantizes the "
        f"cache at "
        "every step, or use DynamicCache."
    )


def _makes(rope: AnyRope, rope_state: Tensor, unrotated: Tensor, rotated: Tensor) -> bool:
    """Whether an embedding makes `rotated` of `unrotated`, both [1, kv_heads, tokens, head_dim]."""
    if 2 * rope.cos_sin(rope_state)[0].shape[-1] > unrotated.shape[-1]:
        return False
    difference = (rope.rotate(unrotated.float(), rope_state) - rotated.float()).abs().max()
    return bool(difference <= TOLERANCE * rotated.float().abs().max())
