"""`enable`, `disable`, `make_default`: the packed cache without a change at the call."""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from narrowkv.calibration import Calibration
from narrowkv.calibration.wrappers import unwrapped
from narrowkv.errors import UnsupportedModelError
from narrowkv.integrations.cache import PackedCache
from narrowkv.integrations.hold import locked
from narrowkv.integrations.preparation import around, prepare, release
from narrowkv.integrations.versions import CACHE, cache_of
from narrowkv.methods import Recipe, get_recipe

PREPARES = "_prepare_cache_for_generation"  # the method of transformers with which `generate` makes its cache
BATCHES = "init_continuous_batching"  # that with which `generate_batch` makes one of its own
NO_BATCHES = (
    "transformers' generate_batch has a paged cache of its own and takes no packed one; make sequences rows of a "
    "narrowkv.CacheGroup, run `narrowkv serve`, or call narrowkv.disable(model) first."
)


@dataclass(frozen=True)
class Default:
    """What `make_default` was given of a model. before: what its `PREPARES` had been replaced by; hook: that of scoring."""

    source: Calibration | Recipe
    options: dict[str, Any]
    before: Any
    hook: Any


def enable(model: PreTrainedModel) -> None:
    """Prepare a model for packed caches, as creating the first cache does; raises UnsupportedModelError if that fails."""
    prepare(model)


def make_default(model: PreTrainedModel, source: Calibration | Recipe | str, *, scoring: bool = False, **options: Any) -> None:
    """Give every call of `model.generate(...)` a new packed cache, also in pipelines and evaluation harnesses.

    source: a Calibration of this model, or a recipe that needs none, or its name. scoring: calls of `model(input_ids)` without
    a cache and without gradients also attend to quantized keys and values, strictly (as harnesses call it for
    log-likelihoods); `use_cache=False` still runs the unquantized model. options: those of PackedCache.

    A call of `generate` with another cache (`past_key_values`, `cache_implementation`) uses that. Copies of the model, also in
    another process, have the same default. `disable` removes it. Raises like PackedCache, and UnsupportedModelError for a
    model that does not generate.
    """
    model = unwrapped(model)
    generators = _generators(model)
    source = source if isinstance(source, Calibration) else get_recipe(source)
    PackedCache(model, source, **options)  # what does not fit together is said now, not at the first call
    with locked(model):
        for generator in generators:
            _remove_default(generator)
            own: Any = generator
            before = vars(generator).get(PREPARES)
            hook = own.register_forward_pre_hook(score_packed, with_kwargs=True) if scoring and generator is model else None
            vars(generator)["narrowkv_default"] = Default(source, options, before, hook)
            # bound to the model, so that a copy of the model makes caches for itself; a method would not survive pickling
            vars(generator)[PREPARES] = functools.partial(prepare_packed, generator)
            vars(generator)[BATCHES] = refuse_batches


def prepare_packed(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """What `generate` calls to create its cache; a cache that the caller chooses comes first."""
    default: Default = vars(self)["narrowkv_default"]
    chosen = generation_config.use_cache is False or generation_config.cache_implementation is not None
    if cache_of(model_kwargs) is None and not chosen:
        model_kwargs[CACHE] = PackedCache(self, default.source, **default.options)
    kind: Any = type(self)
    own = default.before or functools.partial(getattr(kind, PREPARES), self)
    return own(generation_config, model_kwargs, *args, **kwargs)


def refuse_batches(*args: Any, **kwargs: Any) -> None:
    """What `generate_batch` calls to create its cache, which would not be packed: raises UnsupportedModelError."""
    raise UnsupportedModelError(NO_BATCHES)


def score_packed(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook: a call without a cache and without gradients is given one that is read strictly."""
    given = {**inspect.signature(type(module).forward).bind_partial(module, *args).arguments, **kwargs}
    if cache_of(given) is not None or given.get("use_cache") is False or torch.is_grad_enabled():
        return None
    default: Default = vars(module)["narrowkv_default"]
    cache = PackedCache(module, default.source, **{**default.options, "strict": True})
    return args, {**kwargs, CACHE: cache, "use_cache": True}


def disable(model: PreTrainedModel) -> None:
    """Undo `enable` and `make_default`, and remove all hooks from the model."""
    model = unwrapped(model)
    with locked(model):
        for module in around(model):
            _remove_default(module)
        release(model)


def _generators(model: Any) -> list[Any]:
    """The models whose `generate` makes caches: this one, and those in it that it may leave that to (BLIP-2).

    Raises UnsupportedModelError where it does not generate, or not by such a cache.
    """
    found = [module for module in around(model) if hasattr(module, PREPARES)]
    name = type(model).__name__
    if not found:
        raise UnsupportedModelError(
            f"{name} does not generate; make_default wants a model that does (pass a cache to this one: past_key_values=...)."
        )
    if found == [model] and type(model).generate is not GenerationMixin.generate and not _makes_caches(model):
        raise UnsupportedModelError(f"{name} generates in a way of its own, without requesting a cache; use DynamicCache.")
    return found


class _AskedForCacheError(Exception):
    """Raised to end a trial."""


@torch.no_grad()
def _makes_caches(model: Any) -> bool:
    """Try whether a `generate` that is not transformers' own makes its cache as that does."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _AskedForCacheError

    before = vars(model).get(PREPARES)
    vars(model)[PREPARES] = stop
    try:
        model.generate(torch.full((1, 2), 2, device=model.device, dtype=torch.int64), max_new_tokens=1, do_sample=False)
    except _AskedForCacheError:
        return True
    except Exception:  # whatever a model of others may raise
        return False
    finally:
        _put_back(model, before)
    return False


def _remove_default(model: Any) -> None:
    default: Default | None = vars(model).pop("narrowkv_default", None)
    if default is not None:
        vars(model).pop(BATCHES, None)
        _put_back(model, default.before)
        if default.hook is not None:
            default.hook.remove()


def _put_back(model: Any, before: Any) -> None:
    if before is None:
        vars(model).pop(PREPARES, None)
    else:
        vars(model)[PREPARES] = before
