"""`enable`, `disable`, `make_default`: the packed cache without a change at the call."""

import functools
import inspect
import types
from typing import Any

import torch
from transformers import PreTrainedModel

from narrowkv.calibration import Calibration
from narrowkv.integrations.cache import PackedCache
from narrowkv.integrations.preparation import prepare, release
from narrowkv.integrations.versions import CACHE, cache_of
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
    before = vars(model).get("_prepare_cache_for_generation")
    kind: Any = type(model)
    make_own = before.__func__ if isinstance(before, types.MethodType) else kind._prepare_cache_for_generation

    @functools.wraps(make_own)
    def make_packed(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if cache_of(model_kwargs) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = PackedCache(self, source, **options)
        return make_own(self, generation_config, model_kwargs, *args, **kwargs)

    # bound to the model, so that a copy of the model makes caches for itself
    vars(model)["_prepare_cache_for_generation"] = types.MethodType(make_packed, model)
    vars(model)["narrowkv_before_default"] = before
    if scoring:

        def score_packed(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            given = {**inspect.signature(type(module).forward).bind_partial(module, *args).arguments, **kwargs}
            if cache_of(given) is not None or given.get("use_cache") is False or torch.is_grad_enabled():
                return None
            cache = PackedCache(module, source, **{**options, "strict": True})
            return args, {**kwargs, CACHE: cache, "use_cache": True}

        vars(model)["narrowkv_scoring"] = model.register_forward_pre_hook(score_packed, with_kwargs=True)


def disable(model: PreTrainedModel) -> None:
    """Undo `enable` and `make_default`: the model is as it was before it met a packed cache."""
    _forget_default(model)
    release(model)


def _forget_default(model: PreTrainedModel) -> None:
    if "narrowkv_before_default" in vars(model):
        del vars(model)["_prepare_cache_for_generation"]
        before = vars(model).pop("narrowkv_before_default")
        if before is not None:
            vars(model)["_prepare_cache_for_generation"] = before
    hook = vars(model).pop("narrowkv_scoring", None)
    if hook is not None:
        hook.remove()
