"""Hooks on a transformers model: unrotated keys and queries on the way in, our attention on the way out.

No module is replaced. A hook hands each attention module an identity rotary embedding whenever one of our caches is in use,
so the cache is given keys as they are before it; the true cosines, sines and positions are passed alongside them in a
`LayerInputs`. The cache's `update` returns a `Handle` in place of tensors, and an attention function of ours, which the
model's configuration names for as long (hold.py), lets the handle attend. Without one of our caches a prepared model runs the
code that it always ran. preparation.py installs it all.
"""

import contextlib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from narrowkv.attention.rope import CosSin
from narrowkv.codec.encode_buffer import AHEAD
from narrowkv.errors import CacheUseError, NarrowKVWarning, UnsupportedModelError
from narrowkv.integrations.hold import PREFIX, SERVED, hold_of, plain_name
from narrowkv.integrations.masks import LazyMask, lazy_mask
from narrowkv.integrations.probe import identity

# cache_position is of transformers 4, num_items_in_batch a Trainer's for the loss; both are ignored as models ignore them
KNOWN_TENSORS = ("position_ids", "s_aux", "cache_position", "num_items_in_batch")
GIVEN_TENSORS = {"hidden_states", "attention_mask", "past_key_values", "cache", "position_embeddings", *KNOWN_TENSORS}
TWO_DIMENSIONS = "The packed cache takes attention masks of 2 dimensions only (1 for tokens, 0 for padding); pass one or none."
ANOTHER_MODEL = "This cache was made for another model; make one: PackedCache(model, source)."
NOT_ANNOUNCED = (
    "This cache was made for another model, or update was called by hand; make one, "
    "PackedCache(model, source), and let the model fill it: model(input_ids, past_key_values=cache)."
)
NO_WEIGHTS = "A packed cache does not return attention weights; call the model without output_attentions."


@dataclass(frozen=True)
class LayerInputs:
    """Facts on the new tokens of one forward pass, for every layer.

    positions: [1 or batch, new] int64, or None if the model does not pass them to its layers. tables: the rotary embedding's,
    or None. mask: as made by the model for our attention. autocast: whether the caller has it on.
    """

    positions: Tensor | None
    tables: CosSin | None
    mask: LazyMask
    autocast: bool = False

    @property
    def precision(self) -> torch.dtype | None:
        """Under autocast that of the tables, if they are real: a model's own rotation then gives elements of no fewer bits."""
        return None if not self.autocast or self.tables is None or isinstance(self.tables, Tensor) else self.tables[0].dtype

    def row(self, i: int) -> "LayerInputs":
        """Those of row i alone, which has no padding."""
        tables = self.tables
        if tables is not None:
            tables = _row(tables, i) if isinstance(tables, Tensor) else (_row(tables[0], i), _row(tables[1], i))
        positions = None if self.positions is None else _row(self.positions, i)
        return LayerInputs(positions, tables, self.mask.without_padding, self.autocast)

    def valid(self, past: int, new: int) -> Tensor | None:
        """[batch, new] bool, False for padding among the new tokens, which follow `past` others; None where all count.

        Raises CacheUseError where the attention mask does not cover them all.
        """
        return valid_tokens(self.mask.attention_mask.padding, past, new)


def _row(part: Tensor, i: int) -> Tensor:
    """Row i of what has one row for all, or one for each: [1 or batch, ...]."""
    return part if len(part) == 1 else part[i : i + 1]


def valid_tokens(padding: Tensor | None, past: int, new: int) -> Tensor | None:
    """The part of an attention mask [batch, tokens] bool that is about the new tokens, None where none of them is padding; few
    tokens on a GPU are not looked at.

    Raises CacheUseError where the mask does not cover all tokens.
    """
    if padding is None:
        return None
    if padding.shape[1] < past + new:
        raise CacheUseError(
            f"The attention mask covers {padding.shape[1]} tokens, but there are {past} in the cache and {new} new ones; "
            "pass one that covers them all."
        )
    valid = padding[:, past : past + new]
    if valid.is_cuda and new <= AHEAD:  # to look would be to wait
        return valid
    return None if valid.all() else valid


class NarrowCache(Cache):
    """A cache of ours: given keys before the rotary embedding and handles for tensors, unless it is `dense`."""

    dense = False

    def begin(self, module: Any, inputs: LayerInputs) -> None:
        """Called before each attention module runs: passes the inputs of the coming `update` to its layer."""
        layer = int(module.layer_idx)
        if layer < len(self.layers):  # those that read another's have none before transformers 5.22
            receiver: Any = self.layers[layer]
            receiver.inputs = inputs

    def start(self, decoder: nn.Module, tokens: Tensor | None, mask: Any, positions: Any) -> None:
        """Called before the language model runs. tokens: ids or embeddings [batch, new, ...]; mask, positions: as given."""

    def finish(self, failed: bool) -> None:
        """Called when the language model has run to its end, or has failed."""

    def own_positions(self, new_tokens: int) -> Tensor | None:
        """Positions [batch, new_tokens] for a model that is given none; None where it counts them itself."""
        return None


class Handle(Protocol):
    """What such a cache returns from `update` in place of tensors."""

    def attend(self, module: nn.Module, query: Tensor, mask: LazyMask, scaling: float, **kwargs: Any) -> Tensor:
        """query: [batch, query_heads, queries, head_dim] of the last new tokens, not rotated; mask: theirs.

        Returns [batch, queries, query_heads, head_dim].
        """
        ...


def model_attention(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: LazyMask | Tensor | None,
    implementation: str | None = None,
    **kwargs: Any,
):
    """The attention that the user has chosen for the model, or another one, on ordinary tensors; returns what that returns."""
    implementation = implementation or plain_name(module.config)
    if isinstance(mask, LazyMask):
        mask = mask.dense(implementation)
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface().get_interface(implementation, eager)(module, query, keys, values, mask, **kwargs)


_witnessed: ContextVar[set[int] | None] = ContextVar("witnessed", default=None)  # each thread has its own


@contextlib.contextmanager
def witnessing() -> Iterator[set[int]]:
    """While this lasts, ids of the modules whose attention of ordinary tensors comes through our function are noted."""
    found: set[int] = set()
    token = _witnessed.set(found)
    try:
        yield found
    finally:
        _witnessed.reset(token)


def attention_function(module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any):
    """The function registered with transformers: handles attend themselves, tensors go to the model's own attention."""
    if isinstance(key, Tensor):
        if (witnessed := _witnessed.get()) is not None:
            witnessed.add(id(module))
        return model_attention(module, query, key, value, attention_mask, **kwargs)
    _require_known(kwargs, KNOWN_TENSORS)
    return key.attend(module, query, attention_mask, **kwargs), None


def _require_known(kwargs: dict[str, Any], known: Collection[str]) -> None:
    """Raise UnsupportedModelError if attention is called with options that a packed cache does not support."""
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(NO_WEIGHTS)
    strange = [name for name, part in kwargs.items() if isinstance(part, Tensor) and name not in known]
    if strange:
        raise UnsupportedModelError(f"The packed cache does not know what to do with {', '.join(strange)}; use DynamicCache.")


for _name in SERVED:  # when imported, so that a model prepared in another process, whose hooks import this, finds them too
    AttentionInterface.register(PREFIX + _name, attention_function)
    AttentionMaskInterface.register(PREFIX + _name, functools.partial(lazy_mask, _name))


def before_run(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Hook on the language model and on what contains it: configurations name our attention while a cache of ours is used."""
    cache = _cache_in(args, kwargs)
    packed = cache is not None and not cache.dense
    if (hold := hold_of(module)) and (packed or not torch.compiler.is_compiling()):  # others are traced as a whole
        hold.begin(module, packed)


def after_run(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook on the same modules, also after a run that failed."""
    cache = _cache_in(args, kwargs)
    packed = cache is not None and not cache.dense
    if (hold := hold_of(module)) and (packed or not torch.compiler.is_compiling()):
        hold.end(module)


def before_decoder(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook on the language model: notify a packed cache that it begins.

    Raises CacheUseError where the batch is empty, or the caller or the model's configuration said that no cache is to be used,
    and what else can be refused before any layer has stored anything.
    """
    cache = _cache_in(args, kwargs)
    if cache is None:
        return None
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    tokens = next((part for part in given if isinstance(part, Tensor)), None)
    if tokens is not None and not len(tokens):
        raise CacheUseError("The batch is empty; pass at least one sequence.")
    if kwargs.get("use_cache") is False:  # `generate` would then feed the whole text at every step, after the stored tokens
        raise CacheUseError("A cache was passed, but use_cache is off; pass use_cache=True, or set model.config.use_cache.")
    _warn_of_length(module, args, kwargs, cache)
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(NO_WEIGHTS)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() != 2:
        raise UnsupportedModelError(TWO_DIMENSIONS)
    positions = kwargs.get("position_ids")
    own = cache.own_positions(tokens.shape[1]) if positions is None and tokens is not None else None
    cache.start(module, tokens, mask, positions if own is None else own)
    return None if own is None else (args, {**kwargs, "position_ids": own})


def _warn_of_length(module: nn.Module, args: tuple, kwargs: dict[str, Any], cache: NarrowCache) -> None:
    """Warn, once for a model, where there are more tokens than it has positions for."""
    given = next((part for part in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if part is not None), None)
    hold, limit = hold_of(module), getattr(module.config, "max_position_embeddings", None)
    if hold is None or hold.warned_of_length or not isinstance(given, Tensor) or not isinstance(limit, int):
        return
    scaling = getattr(module.config, "rope_parameters", None) or {}
    tokens = given.shape[1] + cache.get_seq_length()
    if tokens > limit and scaling.get("rope_type") != "dynamic":  # which widens as it goes
        hold.warned_of_length = True
        warnings.warn(
            f"{tokens:,} tokens are more than the {limit:,} positions that this model was made for, so its answers may make "
            "no sense; shorten the text.",
            NarrowKVWarning,
            stacklevel=2,
        )


def after_decoder(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook on the language model, called also if it fails: notify a packed cache that it has ended."""
    cache = _cache_in(args, kwargs)
    if cache is not None:
        cache.finish(failed=output is None)


def _cache_in(args: tuple, kwargs: dict[str, Any]) -> NarrowCache | None:
    return next((part for part in (*args, *kwargs.values()) if isinstance(part, NarrowCache)), None)


def before_attention(module: Any, args: tuple, kwargs: dict[str, Any]):
    """Hook: where one of our caches is in use, exchange the rotary embedding for the identity."""
    cache = _cache_in(args, kwargs)
    if cache is None or cache.dense:
        return None
    mask, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    if hidden.shape[1] == 0:
        raise CacheUseError("The prompt is empty; pass at least one token.")
    if not isinstance(mask, LazyMask):
        raise UnsupportedModelError(TWO_DIMENSIONS)
    if not kwargs.keys() <= GIVEN_TENSORS:  # what a module does not name itself goes on to our attention
        _require_known(kwargs, GIVEN_TENSORS | _named(type(module).forward))
    autocast = torch.is_autocast_enabled(hidden.device.type)
    cache.begin(module, LayerInputs(kwargs.get("position_ids"), tables, mask, autocast))
    return None if tables is None else (args, {**kwargs, "position_embeddings": identity(tables)})


@functools.cache
def _named(forward: Callable[..., Any]) -> frozenset[str]:
    """The parameters of a module's forward, for which Python takes as long as our attention of a short text."""
    return frozenset(inspect.signature(forward).parameters)


def require_inputs(inputs: LayerInputs | None) -> LayerInputs:
    """The step that `begin` announced; raises CacheUseError if there was none, as in a model that was not prepared."""
    if inputs is None:
        raise CacheUseError(NOT_ANNOUNCED)
    return inputs
