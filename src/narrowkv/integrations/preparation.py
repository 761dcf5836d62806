"""`prepare`: put the hold of interface.py on a model, once the probe has found that it can be; `release` takes it off."""

import functools
import types
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import DummyLayer

from narrowkv.errors import UnsupportedModelError
from narrowkv.integrations.interface import (
    NAME,
    InterceptingCache,
    LazyMask,
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
    own_layers,
    probe,
    text_config,
)

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
    decoder: Any = model.get_decoder()
    if "narrowkv_guard" not in vars(decoder):
        vars(decoder)["narrowkv_guard"] = decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)
    if hasattr(text_config(model), "original_max_position_embeddings"):
        _keep_cache(model)
    vars(model)["narrowkv_facts"] = facts
    return facts


def _find(model: PreTrainedModel, candidates: list[nn.Module]) -> ModelFacts:
    """Probe the model, see whose attention comes through our function, and try every module with handles for tensors."""
    with witnessing() as witnessed:
        attention, seen = probe(model)
    own = {id(one.module) for one in seen}
    if not own <= witnessed:
        raise UnsupportedModelError(BY_ITSELF)
    readers = [module for module in candidates if id(module) in witnessed - own]
    layers = own_layers(model)
    if not all(isinstance(layers[int(module.layer_idx)], DummyLayer) for module in readers):  # type: ignore[arg-type]
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
    def keep_cache(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = own(self, *args, past_key_values=past_key_values, **kwargs)
        if isinstance(past_key_values, InterceptingCache) and inputs.get("past_key_values") is None:
            past_key_values.reset()
            inputs["past_key_values"] = past_key_values
        return inputs

    vars(model)["prepare_inputs_for_generation"] = types.MethodType(keep_cache, model)


def release(model: PreTrainedModel) -> None:
    """Undo `prepare`."""
    facts: ModelFacts | None = vars(model).pop("narrowkv_facts", None)
    if facts is None:
        return
    vars(model).pop("prepare_inputs_for_generation", None)
    vars(model.get_decoder()).pop("narrowkv_guard").remove()
    previous = "sdpa"
    for module in facts.modules:
        vars(module).pop("narrowkv_hook").remove()
        previous = vars(module).pop("narrowkv_previous")
    if text_config(model)._attn_implementation == NAME:
        _set_attention(model, previous)
