"""`prepare`: set the hooks of hooks.py on a model, once the probe has found that it can be; `release` takes it off."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from narrowkv.calibration.wrappers import decoder_of, unwrapped
from narrowkv.defaults import DENSE
from narrowkv.errors import RecipeError, UnsupportedModelError
from narrowkv.integrations.hold import SERVED, Hold, evaluating, locked, plain_name
from narrowkv.integrations.hooks import (
    NarrowCache,
    after_decoder,
    after_run,
    before_attention,
    before_decoder,
    before_run,
    witnessing,
)
from narrowkv.integrations.observer import ObserverCache, ObserverLayer
from narrowkv.integrations.probe import (
    TOLERANCE,
    AttentionLayerInfo,
    AttentionTrace,
    Layout,
    ModelInfo,
    own_layers,
    probe,
    text_config,
    watch,
)
from narrowkv.integrations.versions import CACHE, cache_of, keeps_nothing
from narrowkv.methods import Recipe

BY_ITSELF = (
    "The model computes attention by itself, not through transformers' interface; choose backend 'dense', which dequantizes "
    "the "
    "cache at every step, or use DynamicCache."
)


def prepare(model: PreTrainedModel) -> ModelInfo:
    """Make a model ready for our caches, once, and return what the probe found of its layers; anew where they have changed.

    Raises UnsupportedModelError where that cannot be; the model is then as it was.
    """
    model = unwrapped(model)
    chosen = plain_name(text_config(model))
    if chosen not in SERVED:
        raise UnsupportedModelError(
            f"Attention implementation {chosen!r} is not supported; load the model with 'sdpa' or 'eager'."
        )
    with locked(model) as hold:
        if hold.info and not hold.info.are_of(model):
            _let_go(model, hold)
        hold.name(_configs(model))
        if not hold.info:
            try:
                _guard(model, hold)
                with evaluating(model), hold.in_use():
                    info = _find(model)
            except BaseException:
                _let_go(model, hold)
                raise
            hold.info = info
            hold.hooks += [module.register_forward_pre_hook(before_attention, with_kwargs=True) for module in info.modules]
        _guard(model, hold)
        if hasattr(text_config(model), "original_max_position_embeddings"):
            _keep_cache(model)
        found: ModelInfo = hold.info
        return found


@torch.no_grad()
def prepare_dense(model: PreTrainedModel) -> ModelInfo:
    """Find the layers of a model that is to be given plain tensors; raises UnsupportedModelError where there are none."""
    model = unwrapped(model)
    with locked(model) as hold:
        if not hold.dense or not hold.dense.are_of(model):
            with evaluating(model):
                seen, _ = watch(model)
            hold.dense = ModelInfo([one.info(None) for one in seen], [], Layout.of(model))
        _guard(model, hold)
        found: ModelInfo = hold.dense
        return found


def model_info_for(model: PreTrainedModel, backend: str, recipes: Sequence[Recipe]) -> ModelInfo:
    """Make a model ready for caches of these recipes on a backend and return the facts of its layers.

    Raises UnsupportedModelError where the model cannot be served so, RecipeError where a recipe does not fit.
    """
    info = prepare_dense(model) if backend == DENSE else prepare(model)
    for recipe in recipes:
        recipe.require_layers([layer_info.layer for layer_info in info.attention])
        if backend == DENSE and any(keys.transform.pre_rope for keys, _ in recipe.every_scheme()):
            raise RecipeError(
                f"Recipe {recipe.name} stores keys before the rotary embedding, which the dense path never sees; choose "
                f"{recipe.name}-postrope, or another backend."
            )
    return info


def _guard(model: PreTrainedModel, hold: Hold) -> None:
    """Notify our caches when the language model begins and ends, and the `Hold` when anything around it does."""
    decoder = decoder_of(model)
    for module in around(model):
        if module in hold.modules:
            continue
        vars(module)["narrowkv_hold"] = hold
        hold.modules.append(module)
        hold.hooks += [
            module.register_forward_pre_hook(before_run, with_kwargs=True),
            module.register_forward_hook(after_run, with_kwargs=True, always_call=True),
        ]
        if module is decoder:
            hold.hooks += [
                module.register_forward_pre_hook(before_decoder, with_kwargs=True),
                module.register_forward_hook(after_decoder, with_kwargs=True, always_call=True),
            ]


def around(model: PreTrainedModel) -> list[nn.Module]:
    """The model, what in it contains the language model, and that."""
    decoder = decoder_of(model)
    name = next(name for name, module in model.named_modules() if module is decoder)
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration that names the attention of the language model, or of what contains it."""
    modules = [*around(model), *decoder_of(model).modules()]
    found = [text_config(model), *(vars(module)["config"] for module in modules if "config" in vars(module))]
    return [config for config in found if hasattr(config, "_attn_implementation")]


def _find(model: PreTrainedModel) -> ModelInfo:
    """Probe the model, see whose attention comes through our function, and try every module with handles for tensors."""
    with witnessing() as witnessed:
        attention, seen = probe(model)
    own = {id(one.module) for one in seen}
    if not own <= witnessed:
        raise UnsupportedModelError(BY_ITSELF)
    layout = Layout.of(model)
    readers = [module for module in layout.modules if id(module) in witnessed - own]
    layers = own_layers(text_config(model))
    indices = [int(module.layer_idx) for module in readers]  # type: ignore[arg-type]
    if not all(index >= len(layers) or keeps_nothing(layers[index]) for index in indices):
        raise UnsupportedModelError(
            "Some attention modules of this model bypass the cache in an unknown way; use DynamicCache."
        )
    for layer_info, one in zip(attention, seen, strict=True):
        _try_handles(layer_info, one)
    return ModelInfo(attention, readers, layout)


@torch.no_grad()
def _try_handles(layer_info: AttentionLayerInfo, seen: AttentionTrace) -> None:
    """Run one module again with handles in place of tensors; raises UnsupportedModelError where its output differs."""
    name = next(name for name, part in seen.kwargs.items() if isinstance(part, Cache))
    cache = ObserverCache([ObserverLayer(layer_info.rope) for _ in range(layer_info.layer + 1)])
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
            f"Layer {layer_info.layer} computes something else when its keys are rotated from outside; use DynamicCache."
        )


class KeepCache:
    """Replaces a model's `prepare_inputs_for_generation`.

    Some models (Phi-3) drop the cache they are given when a sequence outgrows the length they were first trained on, since
    all keys must then be computed anew; ours is emptied and filled again instead.
    """

    def __init__(self, model: Any):
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:  # `generate` looks at it
        return inspect.signature(type(self.model).prepare_inputs_for_generation.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own: Any = functools.partial(type(self.model).prepare_inputs_for_generation, self.model)
        inputs: dict[str, Any] = own(*args, **kwargs)
        cache = cache_of(kwargs)
        if isinstance(cache, NarrowCache) and cache_of(inputs) is None:
            cache.reset()
            # all tokens, where transformers before 5.22 would read the newest alone
            inputs = {**own(*args, **{**kwargs, "next_sequence_length": None}), CACHE: cache}
        return inputs


def _keep_cache(model: Any) -> None:
    if hasattr(model, "prepare_inputs_for_generation") and "prepare_inputs_for_generation" not in vars(model):
        vars(model)["prepare_inputs_for_generation"] = KeepCache(model)


def release(model: PreTrainedModel) -> None:
    """Undo `prepare` and `prepare_dense`."""
    model = unwrapped(model)
    with locked(model) as hold:
        _let_go(model, hold)
        hold.dense = None
        vars(model).pop("narrowkv_fingerprint", None)


def _let_go(model: PreTrainedModel, hold: Hold) -> None:
    for hook in hold.hooks:
        hook.remove()
    for module in hold.modules:
        vars(module).pop("narrowkv_hold", None)
        if isinstance(vars(module).get("prepare_inputs_for_generation"), KeepCache):
            del vars(module)["prepare_inputs_for_generation"]
    vars(decoder_of(model))["narrowkv_hold"] = hold  # while it is locked
    hold.info, hold.hooks, hold.modules, hold.configs = None, [], [], []
