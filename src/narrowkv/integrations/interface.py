"""The hold on a transformers model: unrotated keys and queries on the way in, our attention on the way out.

No module is replaced. A hook hands each attention module an identity rotary embedding whenever one of our caches is in use,
so the cache is given keys as they are before it; the true cosines, sines and positions travel beside them in a `Step`. The
cache's `update` returns a `Handle` in place of tensors, and the attention function registered under the name `narrowkv` lets
the handle attend. Without one of our caches a prepared model computes exactly what it did before.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from narrowkv.errors import CacheUseError, UnsupportedModelError
from narrowkv.integrations.probe import AttentionFacts, probe

NAME = "narrowkv"
KNOWN_TENSORS = ("position_ids", "s_aux", "cache_position")
ANOTHER_MODEL = "This cache was made for another model; make one with calibration.cache(model) or recipe.cache(model)."


class LazyMask:
    """What transformers asked of the mask, made dense only if somebody needs it so."""

    def __init__(self, **request: Any):
        self.request = request
        self._dense: dict[str, Tensor | None] = {}

    @property
    def padding(self) -> Tensor | None:
        """[batch, tokens] bool, False where a token is padding, or None where there is none."""
        return self.request["attention_mask"]

    def dense(self, implementation: str) -> Tensor | None:
        """The mask as the named attention implementation of transformers wants it."""
        if implementation not in self._dense:
            make = AttentionMaskInterface()[implementation]
            self._dense[implementation] = make(**self.request)
        return self._dense[implementation]


@dataclass(frozen=True)
class Step:
    """What one forward pass tells every layer about its new tokens.

    positions: [1 or batch, new] int64. mask: as made by the model for our attention.
    """

    positions: Tensor
    mask: LazyMask

    def valid(self, past: int, new: int) -> Tensor | None:
        """[batch, new] bool, False for padding among the new tokens, which follow `past` others; None where all count."""
        if self.mask.padding is None:
            return None
        valid = self.mask.padding[:, past : past + new]
        return None if valid.all() else valid


class InterceptingCache(Cache):
    """A cache that wants keys before the rotary embedding."""

    def begin(self, module: Any, step: Step) -> None:
        """Called before each attention module runs: tells its layer what the coming `update` is about."""
        layer = int(module.layer_idx)
        receiver: Any = self.layers[layer]
        receiver.step = step


class Handle(Protocol):
    """What such a cache returns from `update` in place of tensors."""

    def attend(self, module: nn.Module, query: Tensor, scaling: float, **kwargs: Any) -> Tensor:
        """query: [batch, query_heads, new, head_dim] unrotated. Returns [batch, new, query_heads, head_dim]."""
        ...


def model_attention(
    module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: LazyMask | Tensor | None, **kwargs: Any
):
    """The attention that the model used before `prepare`, on ordinary tensors; returns what that returns."""
    implementation = getattr(module, "narrowkv_previous", "sdpa")
    if isinstance(mask, LazyMask):
        mask = mask.dense(implementation)
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface().get_interface(implementation, eager)(module, query, keys, values, mask, **kwargs)


_witnessed: set[int] | None = None  # while a probe runs: ids of the modules whose attention comes through here


def attention_function(module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any):
    """The function registered with transformers: handles attend themselves, tensors go to the model's own attention."""
    if isinstance(key, Tensor):
        if _witnessed is not None:
            _witnessed.add(id(module))
        return model_attention(module, query, key, value, attention_mask, **kwargs)
    strange = [name for name, part in kwargs.items() if isinstance(part, Tensor) and name not in KNOWN_TENSORS]
    if strange:
        raise UnsupportedModelError(f"The packed cache does not know what to do with {', '.join(strange)}; use DynamicCache.")
    return key.attend(module, query, **kwargs), None


def _before_attention(module: Any, args: tuple, kwargs: dict[str, Any]):
    """Hook: where one of our caches is in use, exchange the rotary embedding for the identity."""
    cache = next((part for part in kwargs.values() if isinstance(part, InterceptingCache)), None)
    if cache is None:
        return None
    if module.config._attn_implementation != NAME:
        raise CacheUseError(
            f"The model's attention was set to {module.config._attn_implementation!r} after the cache was made; make another."
        )
    mask, positions = kwargs.get("attention_mask"), kwargs["position_ids"]
    if positions.shape[1] == 0:
        raise CacheUseError("The prompt is empty; pass at least one token.")
    if not isinstance(mask, LazyMask) or mask.request["use_vmap"]:
        raise UnsupportedModelError(
            "The packed cache takes attention masks of 2 dimensions only (1 for tokens, 0 for padding); pass one or none."
        )
    cache.begin(module, Step(positions, mask))
    if kwargs.get("position_embeddings") is None:
        return None
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def prepare(model: PreTrainedModel) -> list[AttentionFacts]:
    """Make a model ready for our caches, once, and return what the probe found of its layers.

    Raises UnsupportedModelError where that cannot be; the model is then as it was.
    """
    global _witnessed
    known: list[AttentionFacts] | None = vars(model).get("narrowkv_facts")
    chosen = model.config._attn_implementation
    if known and chosen == NAME:
        return known
    if chosen not in ("eager", "sdpa", NAME):
        raise UnsupportedModelError(
            f"Attention implementation {chosen!r} is not supported; load the model with 'sdpa' or 'eager'."
        )
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, LazyMask)
    previous = "sdpa" if chosen == NAME else chosen
    candidates = [module for module in model.modules() if hasattr(module, "layer_idx")]
    for module in candidates:
        vars(module)["narrowkv_previous"] = previous
    model.set_attn_implementation(NAME)
    facts: list[AttentionFacts] = []
    try:
        _witnessed = set()
        found = known or probe(model)
        if not known and not {id(layer.module) for layer in found} <= _witnessed:
            raise UnsupportedModelError(
                "The model computes attention by itself, not through transformers' interface; use DynamicCache."
            )
        facts = found
    finally:
        _witnessed = None
        for module in candidates:
            if not any(module is layer.module for layer in facts):
                del vars(module)["narrowkv_previous"]
        if not facts:
            model.set_attn_implementation(previous)
    for layer in facts:
        if "narrowkv_hook" not in vars(layer.module):
            vars(layer.module)["narrowkv_hook"] = layer.module.register_forward_pre_hook(_before_attention, with_kwargs=True)
    vars(model)["narrowkv_facts"] = facts
    return facts


def release(model: PreTrainedModel) -> None:
    """Undo `prepare`."""
    for layer in vars(model).pop("narrowkv_facts", []):
        vars(layer.module).pop("narrowkv_hook").remove()
        previous = vars(layer.module).pop("narrowkv_previous")
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation(previous)


def require_step(step: Step | None) -> Step:
    """The step that `begin` announced; raises CacheUseError if there was none, as in a model that was not prepared."""
    if step is None:
        raise CacheUseError(ANOTHER_MODEL)
    return step
