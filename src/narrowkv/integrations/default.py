"""`enable`, `disable`, `make_default`: the packed cache without a change at the call."""

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

from narrowkv.calibration import Calibration
from narrowkv.integrations.cache import PackedCache
from narrowkv.integrations.dense import release_dense
from narrowkv.integrations.preparation import prepare, release
from narrowkv.methods import Recipe, get_recipe


def enable(model: PreTrainedModel) -> None:
    """Make a model ready for packed caches, as making the first cache does; raises UnsupportedModelError where that fails."""
    prepare(model)


def make_default(model: PreTrainedModel, source: Calibration | Recipe | str, *, scoring: bool = False, **options: Any) -> None:
    """Let plain `model.generate(...)` use a new packed cache at every call, and so pipelines and evaluation harnesses too.

    source: a calibration for this model, or a calibration-free recipe or its name. scoring: `model(input_ids)` without a cache
    and without gradients also sees quantised keys and values, strictly (what a harness does for log-likelihoods);
    `use_cache=False` still asks for the unquantised model. options: of PackedCache. `disable` undoes it. Raises as
    PackedCache does.
    """
    source = source if isinstance(source, Calibration) else get_recipe(source)
    PackedCache(model, source, **options)  # what does not fit together is said now, not at the first call
    _forget_default(model)
    make_own: Any = model._prepare_cache_for_generation

    @functools.wraps(make_own)
    def make_packed(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = PackedCache(model, source, **options)
        return make_own(generation_config, model_kwargs, *args, **kwargs)

    vars(model)["_prepare_cache_for_generation"] = make_packed
    if scoring:

        def score_packed(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            unasked = kwargs.get("past_key_values") is None and kwargs.get("use_cache") is not False
            if not unasked or torch.is_grad_enabled():
                return None
            cache = PackedCache(model, source, **{**options, "strict": True})
            return args, {**kwargs, "past_key_values": cache, "use_cache": True}

        vars(model)["narrowkv_scoring"] = model.register_forward_pre_hook(score_packed, with_kwargs=True)


def disable(model: PreTrainedModel) -> None:
    """Undo `enable` and `make_default`: the model is as it was before it met a packed cache."""
    _forget_default(model)
    release(model)
    release_dense(model)


def _forget_default(model: PreTrainedModel) -> None:
    vars(model).pop("_prepare_cache_for_generation", None)
    hook = vars(model).pop("narrowkv_scoring", None)
    if hook is not None:
        hook.remove()
