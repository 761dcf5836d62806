"""`quantized_attention`: a model whose keys and values are quantized within its forward pass, so that it can be trained so."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from narrowkv.calibration import Calibration
from narrowkv.calibration.wrappers import decoder_of, unwrapped
from narrowkv.errors import CacheUseError, TrainingError, UnsupportedModelError
from narrowkv.integrations.hold import hold_of
from narrowkv.integrations.hooks import NarrowCache
from narrowkv.integrations.preparation import prepare
from narrowkv.integrations.versions import cache_of
from narrowkv.methods import Recipe
from narrowkv.training.layer import TrainingCache


class QuantizedAttention:
    """What `quantized_attention` yields: it can be switched off for a while."""

    def __init__(self, cache: TrainingCache):
        self._cache = cache
        self._off = 0

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within, the model attends to exact keys and values, as a teacher does; not for a backward pass."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Hook on the language model: it makes no cache of its own."""
        if self._stays_out(args, kwargs):
            return None
        if cache_of(kwargs) is not None:
            raise CacheUseError(
                "Within quantized_attention a model takes no cache but a PackedCache; call it without one (use_cache=False), "
                "or generate after training."
            )
        return args, {**kwargs, "use_cache": False}

    def before_attention(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Hook on an attention module, which takes a cache by that name: it is given ours. Checkpointing leaves out whatever
        cache a layer is given, so ours comes no sooner.
        """
        return None if self._stays_out(args, kwargs) else (args, {**kwargs, name: self._cache})

    def _stays_out(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether it is switched off, or a cache of ours is in use."""
        return self._off > 0 or any(isinstance(part, NarrowCache) for part in (*args, *kwargs.values()))


@contextlib.contextmanager
def quantized_attention(model: PreTrainedModel, source: Calibration | Recipe | str) -> Iterator[QuantizedAttention]:
    """Within, keys and values are quantized in each forward pass of a model, and gradients flow through them.

    Attention is that of `PackedCache(model, source, strict=True)`: the same keys and values, bit for bit, with its sinks,
    outliers and exact window. Their gradient is the straight-through estimator's (`codec.straight_through`), all others are
    exact. The forward pass and its backward pass must both run within; gradient checkpointing, autocast and adapters of PEFT
    are served. model, source: like those of PackedCache. What its projections add to keys and values is found once, on
    entering.

    Yields a `QuantizedAttention`. Raises TrainingError where no parameter wants a gradient, CacheUseError within another
    quantized_attention of the model, UnsupportedModelError where layers share keys, and otherwise as PackedCache does.
    """
    model = unwrapped(model)
    if torch.is_grad_enabled() and not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            "All parameters of this model are frozen, so there is nothing to train; add adapters, or free some."
        )
    cache = TrainingCache(model, source, strict=True)
    info, decoder = prepare(model), decoder_of(model)
    hold = hold_of(decoder)
    assert hold is not None
    if hold.is_in_use:
        raise CacheUseError("This model is within quantized_attention already; leave that first.")
    if info.readers:
        raise UnsupportedModelError("Layers of this model share keys and values, which cannot be trained quantized yet.")
    cache.follow(decoder)
    found = QuantizedAttention(cache)
    hooks = [decoder.register_forward_pre_hook(found.before_decoder, with_kwargs=True, prepend=True)]
    for layer in info.attention:
        before_attention = functools.partial(found.before_attention, layer.cache_argument)
        hooks.append(layer.module.register_forward_pre_hook(before_attention, with_kwargs=True, prepend=True))
    try:
        with hold.in_use():
            yield found
    finally:
        for hook in hooks:
            hook.remove()
