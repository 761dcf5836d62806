"""The probe: run a model on a few tokens to find its attention modules and how each of them rotates its keys.

Nothing is known of a family beforehand. Every attention module is run twice on the same input, once with the model's own
rotary embedding and once with the identity in its place; from the two results the rotation is recognised, or the model is
refused with the reason.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from narrowkv.attention import AnyRope, Rope, StoredRope
from narrowkv.attention.rope import Tables
from narrowkv.codec.ranges import require_finite
from narrowkv.errors import UnsupportedModelError
from narrowkv.integrations.projections import NOTHING_KNOWN, Constants, constants_of
from narrowkv.integrations.versions import CACHE, keeps_nothing

MAX_HEAD_DIM = 512  # the index of an outlier in its block has 16 bits, one of them the sign
TOKENS, FIRST_POSITION = 12, 3
TOLERANCE = 2e-2  # of the largest key: bfloat16 rounds cosine, sine and product
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")  # angles that positions alone determine
LAYOUTS: tuple[Any, ...] = ("halves", "repeated", "once")


@dataclass(frozen=True)
class AttentionFacts:
    """One attention module that keeps keys and values: its layer, kv_heads, head_dim, how it rotates keys (None: not), and
    what all its keys and values have in common.
    """

    module: nn.Module
    layer: int
    kv_heads: int
    head_dim: int
    rope: AnyRope | None
    constants: Constants = NOTHING_KNOWN


@dataclass(frozen=True)
class ModelFacts:
    """attention: the modules that keep keys and values, by layer. readers: those that use another layer's."""

    attention: list[AttentionFacts]
    readers: list[nn.Module]

    @property
    def modules(self) -> list[nn.Module]:
        """All attention modules."""
        return [*(layer.module for layer in self.attention), *self.readers]


@dataclass
class Seen:
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

    def facts(self, rope: AnyRope | None, constants: Constants = NOTHING_KNOWN) -> AttentionFacts:
        """What is known of the module, given how it rotates keys."""
        return AttentionFacts(self.module, self.layer, self.keys[0].shape[1], self.keys[0].shape[3], rope, constants)

    def run(self, running: list["Seen"], factor: float = 1.0) -> tuple[Tensor, Tensor]:
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
    """A layer of a cache that holds nothing, for those that only want to see what passes."""

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

    def __init__(self, running: list[Seen], updated: dict[int, Seen]):
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode for a while, and then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def own_layers(config: Any) -> list[Any]:
    """The cache layers that transformers would use: those of attention, which a packed cache replaces, and all others."""
    return list(DynamicCache(config=config).layers)


def keeps_keys(layer: Any) -> bool:
    """Whether a packed layer can take this one's place; raises UnsupportedModelError on kinds that nobody has looked at."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return True
    if type(layer) is LinearAttentionLayer or keeps_nothing(layer):
        return False
    raise UnsupportedModelError(f"Layers of the kind {type(layer).__name__} cannot be packed; use DynamicCache.")


@torch.no_grad()
def probe(model: PreTrainedModel) -> tuple[list[AttentionFacts], list[Seen]]:
    """Facts of every attention module that keeps keys, by layer, and what was seen of each.

    Raises UnsupportedModelError where one of them cannot be served.
    """
    seen, running = watch(model)
    tables = {id(one.kwargs.get("position_embeddings")): one.kwargs.get("position_embeddings") for one in seen}
    names = {key: f"angles{i}" for i, key in enumerate(tables)}  # layers that are given the same tables share their record
    facts = []
    for one in seen:
        rope = _rope(model, one, running, names[id(one.kwargs.get("position_embeddings"))])
        run = functools.partial(one.run, running)
        facts.append(one.facts(rope, constants_of(one.module, run, rope, _frequencies_of(model, rope, one))))
    return facts, seen


def watch(model: PreTrainedModel) -> tuple[list[Seen], list[Seen]]:
    """Run the model once on a few tokens: what its attention modules were given and stored.

    Returns those that stored keys and values, by layer, and the list that such a module must stand in last to be run again.
    Raises UnsupportedModelError where the model does not store as a packed cache understands it.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UnsupportedModelError(
            "A model spread over several devices by device_map is not supported; use tensor parallelism (docs/processes.md)."
        )
    layers, running, updated = own_layers(text_config(model)), list[Seen](), dict[int, Seen]()
    expected = {i for i, layer in enumerate(layers) if keeps_keys(layer)}
    cache = Cache(layers=[_ProbeLayer(running, updated) if i in expected else layer for i, layer in enumerate(layers)])
    hooks = []

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        running.append(Seen(module, args, kwargs))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop().output = output

    for module in model.modules():
        if hasattr(module, "layer_idx"):
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
    try:
        embedding: Any = model.get_input_embeddings()
        ids = torch.arange(2, 2 + TOKENS, device=model.device)[None] % embedding.weight.shape[0]
        positions = torch.arange(FIRST_POSITION, FIRST_POSITION + TOKENS, device=model.device)[None]
        decoder: Any = model.get_decoder()
        decoder(input_ids=ids, position_ids=positions, **{CACHE: cache}, use_cache=True)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
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


def _require_shapes(seen: Seen) -> None:
    keys, values, layer = seen.keys[0], seen.values[0], seen.layer
    if not keys.is_meta:
        require_finite(keys, "On a few tokens, keys")
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


def identity(tables: Tables) -> Tables:
    """Tables of a rotary embedding that leaves everything as it is."""
    return torch.ones_like(tables) if isinstance(tables, Tensor) else (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))


def _rope(model: PreTrainedModel, seen: Seen, running: list[Seen], name: str) -> AnyRope | None:
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
                return _by_position(model, seen.kwargs.get("position_ids"), rope, tables) or rope
    raise UnsupportedModelError(
        f"Layer {seen.layer} rotates its keys in a way that is not known; choose backend 'dense', which decodes the cache at "
        "every step, or use DynamicCache."
    )


def _makes(rope: AnyRope, kept: Tensor, unrotated: Tensor, rotated: Tensor) -> bool:
    """Whether an embedding makes `rotated` of `unrotated`, both [1, kv_heads, tokens, head_dim]."""
    if 2 * rope.cos_sin(kept)[0].shape[-1] > unrotated.shape[-1]:
        return False
    difference = (rope.rotate(unrotated.float(), kept) - rotated.float()).abs().max()
    return bool(difference <= TOLERANCE * rotated.float().abs().max())


def _by_position(model: PreTrainedModel, positions: Tensor | None, stored: StoredRope, tables: Tables) -> Rope | None:
    """The same embedding made of positions alone, if frequencies that the model holds and never changes give its tables.

    Every sine must agree for itself: embeddings of one model may differ in their slowest frequencies only.
    """
    if positions is None or positions.dim() != 2:
        return None
    if has_sections(model):
        return None
    kept = stored.keep(None, tables)
    expected = torch.cat(stored.cos_sin(kept), dim=-1).double()
    tolerance = (2**-6 if kept.dtype.itemsize == 2 else 1e-3) * expected.abs() + 1e-6
    for inverse, scaling, kind in frequencies(model):
        rope = Rope(inverse, scaling, stored.interleaved)
        if kind in STATIC_ROPE and 2 * len(inverse) == expected.shape[-1]:
            found = torch.cat(rope.cos_sin(positions), dim=-1).double()
            if bool(((found - expected).abs() <= tolerance).all()):
                return rope
    return None


def _frequencies_of(model: PreTrainedModel, rope: AnyRope | None, seen: Seen) -> Tensor | None:
    """Those of a rotary embedding, [pairs]; where a position does not determine its angles, about those."""
    if rope is None or isinstance(rope, Rope):
        return None if rope is None else rope.inverse_frequencies
    pairs = rope.cos_sin(rope.keep(None, seen.kwargs["position_embeddings"]))[0].shape[-1]
    return next((inverse for inverse, _, _ in frequencies(model) if len(inverse) == pairs), None)


def has_sections(model: PreTrainedModel) -> bool:
    """Whether a token has several positions, which are alike only in text."""
    return "mrope_section" in str(getattr(text_config(model), "rope_parameters", None) or {})


def frequencies(model: PreTrainedModel) -> list[tuple[Tensor, float, str]]:
    """All inverse frequencies that the model holds, with their scaling and type."""
    found = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                prefix = name.removesuffix("inv_freq")
                kind: Any = getattr(module, "rope_type", "default")
                kind = kind.get(prefix.rstrip("_"), "default") if isinstance(kind, dict) else kind
                scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
                found.append((buffer.detach().float(), scaling, str(kind)))
    return found
