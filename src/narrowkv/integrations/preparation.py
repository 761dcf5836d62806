"""`prepare`: put the hold of interface.py on a model, once the probe has found that it can be; `release` takes it off."""

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from narrowkv.defaults import DENSE
from narrowkv.errors import RecipeError, UnsupportedModelError
from narrowkv.integrations.interface import (
    NAME,
    LazyMask,
    NarrowCache,
    after_decoder,
    attention_function,
    before_attention,
    before_decoder,
    witnessing,
)
from narrowkv.integrations.passing import PassingCache, PassingLayer
from narrowkv.integrations.probe import (
    TOLERANCE,
    AttentionFacts,
    ModelFacts,
    Seen,
    evaluating,
    own_layers,
    probe,
    text_config,
    watch,
)
from narrowkv.integrations.versions import CACHE, cache_of, keeps_nothing
from narrowkv.methods import Recipe

BY_ITSELF = (
    "The model computes attention by itself, not through transformers' interface; choose backend 'dense', which decodes the "
    "cache at every step, or use DynamicCache."
)


def prepare(model: PreTrainedModel) -> ModelFacts:
    """Make a model ready for our caches, once, and return what the probe found of its layers.

    Raises UnsupportedModelError where that cannot be; the model is then as it was.
    """
    known: ModelFacts | None = vars(model).get("narrowkv_facts")
    chosen = text_config(model)._attn_implementation
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
    _set_attention(model, NAME)
    facts: ModelFacts | None = known
    try:
        with evaluating(model):
            facts = facts or _find(model, candidates)
    finally:
        served = {id(module) for module in facts.modules} if facts else set()
        for module in candidates:
            if id(module) not in served:
                del vars(module)["narrowkv_previous"]
        if not facts:
            _set_attention(model, previous)
    for module in facts.modules:
        if "narrowkv_hook" not in vars(module):
            vars(module)["narrowkv_hook"] = module.register_forward_pre_hook(before_attention, with_kwargs=True)
    _guard(model)
    if hasattr(text_config(model), "original_max_position_embeddings"):
        _keep_cache(model)
    vars(model)["narrowkv_facts"] = facts
    return facts


@torch.no_grad()
def prepare_dense(model: PreTrainedModel) -> ModelFacts:
    """Find the layers of a model that is to be given plain tensors; raises UnsupportedModelError where there are none."""
    known: ModelFacts | None = vars(model).get("narrowkv_dense")
    if known is not None:
        return known
    with evaluating(model):
        seen, _ = watch(model)
    vars(model)["narrowkv_dense"] = found = ModelFacts([one.facts(None) for one in seen], [])
    _guard(model)
    return found


def facts_for(model: PreTrainedModel, backend: str, recipes: Sequence[Recipe]) -> ModelFacts:
    """Make a model ready for caches of these recipes on a backend and return the facts of its layers.

    Raises UnsupportedModelError where the model cannot be served so, RecipeError where a recipe does not fit.
    """
    facts = prepare_dense(model) if backend == DENSE else prepare(model)
    for recipe in recipes:
        recipe.require_layers([fact.layer for fact in facts.attention])
        if backend == DENSE and any(keys.pre_rope for keys, _ in recipe.every_scheme()):
            raise RecipeError(
                f"Recipe {recipe.name} stores keys before the rotary embedding, which the dense path never sees; choose "
                f"{recipe.name}-postrope, or another backend."
            )
    return facts


def _guard(model: PreTrainedModel) -> None:
    """Let our caches know when the language model begins and when it has ended."""
    decoder: Any = model.get_decoder()
    if "narrowkv_guard" not in vars(decoder):
        vars(decoder)["narrowkv_guard"] = (
            decoder.register_forward_pre_hook(before_decoder, with_kwargs=True),
            decoder.register_forward_hook(after_decoder, with_kwargs=True),
        )


def _find(model: PreTrainedModel, candidates: list[nn.Module]) -> ModelFacts:
    """Probe the model, see whose attention comes through our function, and try every module with handles for tensors."""
    with witnessing() as witnessed:
        attention, seen = probe(model)
    own = {id(one.module) for one in seen}
    if not own <= witnessed:
        raise UnsupportedModelError(BY_ITSELF)
    readers = [module for module in candidates if id(module) in witnessed - own]
    layers = own_layers(text_config(model))
    places = [int(module.layer_idx) for module in readers]  # type: ignore[arg-type]
    if not all(place >= len(layers) or keeps_nothing(layers[place]) for place in places):
        raise UnsupportedModelError(
            "Some attention modules of this model bypass the cache in an unknown way; use DynamicCache."
        )
    for fact, one in zip(attention, seen, strict=True):
        _try_handles(fact, one)
    return ModelFacts(attention, readers)


@torch.no_grad()
def _try_handles(fact: AttentionFacts, seen: Seen) -> None:
    """Run one module again with handles in place of tensors; raises UnsupportedModelError where its output differs."""
    name = next(name for name, part in seen.kwargs.items() if isinstance(part, Cache))
    cache = PassingCache([PassingLayer(fact.rope) for _ in range(fact.layer + 1)])
    hook = seen.module.register_forward_pre_hook(before_attention, with_kwargs=True)
    try:
        output = seen.module(*seen.args, **{**seen.kwargs, name: cache})
    except (TypeError, AttributeError) as error:
        raise UnsupportedModelError(BY_ITSELF) from error
    finally:
        hook.remove()
    found, expected = (part[0] if isinstance(part, tuple) else part for part in (output, seen.output))
    if (found - expected).float().abs().max() > TOLERANCE * expected.float().abs().max():
        raise UnsupportedModelError(
            f"Layer {fact.layer} computes something else when its keys are rotated from outside; use DynamicCache."
        )


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Choose an attention implementation for the language part alone."""
    text = text_config(model)
    if text is model.config:
        model.set_attn_implementation(name)
    else:
        (part,) = (key for key in model.config.sub_configs if getattr(model.config, key, None) is text)
        model.set_attn_implementation({part: name})


def _keep_cache(model: Any) -> None:
    """Some models (Phi-3) drop the cache they are given when a sequence outgrows the length they were first trained on, since
    all keys must then be computed anew; ours is emptied and filled again instead.
    """
    if "prepare_inputs_for_generation" in vars(model):
        return
    own = type(model).prepare_inputs_for_generation

    @functools.wraps(own)  # `generate` looks at the signature
    def keep_cache(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = own(self, *args, **kwargs)
        cache = cache_of(kwargs)
        if isinstance(cache, NarrowCache) and cache_of(inputs) is None:
            cache.reset()
            # all tokens, where transformers before 5.22 would read the newest alone
            inputs = {**own(self, *args, **{**kwargs, "next_sequence_length": None}), CACHE: cache}
        return inputs

    vars(keep_cache)["narrowkv"] = True
    vars(model)["prepare_inputs_for_generation"] = types.MethodType(keep_cache, model)


def release(model: PreTrainedModel) -> None:
    """Undo `prepare` and `prepare_dense`."""
    for hook in vars(model.get_decoder()).pop("narrowkv_guard", ()):
        hook.remove()
    vars(model).pop("narrowkv_dense", None)
    vars(model).pop("narrowkv_fingerprint", None)
    if getattr(vars(model).get("prepare_inputs_for_generation"), "narrowkv", False):
        del vars(model)["prepare_inputs_for_generation"]
    facts: ModelFacts | None = vars(model).pop("narrowkv_facts", None)
    previous = "sdpa"
    for module in facts.modules if facts else ():
        vars(module).pop("narrowkv_hook").remove()
        previous = vars(module).pop("narrowkv_previous")
    if facts and text_config(model)._attn_implementation == NAME:
        _set_attention(model, previous)
