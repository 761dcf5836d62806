"""`LazyMask`: the arguments by which transformers makes an attention mask, in place of the mask."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from narrowkv.attention import AttentionMask


class LazyMask:
    """The arguments of an attention mask, made dense only if it is needed.

    It passes for the tensor [batch, 1, queries, keys] that it stands for, since models may do anything with a mask between
    making it and attending: its shape is known, and whatever else is read from it, or computed with it, is answered by that
    tensor. implementation: the attention of transformers whose masks it stands for.
    """

    def __init__(self, implementation: str, **request: Any):
        self.implementation = implementation
        self.request = request
        self._dense: dict[str, Tensor | None] = {}

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return function(*_made(args), **_made(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("request", "_dense"):  # not of a tensor, or of a mask that is being copied
            raise AttributeError(name)
        return getattr(self.made(), name)

    @property
    def shape(self) -> torch.Size:
        """[batch, 1, queries, keys]."""
        return torch.Size((self.request["batch_size"], 1, int(self.request["q_length"]), int(self.request["kv_length"])))

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    def dim(self) -> int:
        """4."""
        return 4

    def __getitem__(self, part: Any) -> Any:
        """The mask of the last queries alone is one like this, as some models slice it (Gemma 4 in layers that
        share keys).
        """
        nothing, length = slice(None), int(self.request["q_length"])
        if isinstance(part, tuple) and len(part) == 4 and isinstance(part[2], slice):
            start, stop, step = part[2].indices(length)
            if (part[0], part[1], part[3]) == (nothing, nothing, nothing) and (stop, step) == (length, 1):
                changed = {"q_length": length - start, "q_offset": self.request["q_offset"] + start}
                return LazyMask(self.implementation, **{**self.request, **changed})
        return self.made()[part]

    def made(self) -> Tensor:
        """The tensor that this stands for."""
        if "" not in self._dense:
            whole = {**self.request, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            self._dense[""] = AttentionMaskInterface()[self.implementation](**whole)
        dense = self._dense[""]
        assert dense is not None
        return dense

    @functools.cached_property
    def attention_mask(self) -> AttentionMask:
        """What a query may see, plainly said where it is causal or a sliding window."""
        padding, rule = self.request["attention_mask"], self.request["mask_function"]
        if rule is causal_mask_function:
            return AttentionMask(padding)
        window = _window_of(rule)
        if window is not None:
            return AttentionMask(padding, window)
        return AttentionMask(
            padding, rule=self._look_up if self.request["use_vmap"] else rule, batch=self.request["batch_size"]
        )

    @functools.cached_property
    def without_padding(self) -> "LazyMask":
        """The same where no token is hidden from all."""
        if self.request["attention_mask"] is None:
            return self
        return LazyMask(self.implementation, **{**self.request, "attention_mask": None})

    def row(self, i: int, first: int, past: int, new: int) -> "LazyMask":
        """That of row i alone, without padding, whose keys are the tokens from `first` on, of `past` ones and `new` ones."""
        queries, rule = int(self.request["q_length"]), self.request["mask_function"]
        if rule is not causal_mask_function and _window_of(rule) is None:
            rule = _shifted(rule, i)
        sizes = {"kv_offset": first, "kv_length": past + new - first, "q_offset": past + new - queries}
        changed = {"batch_size": 1, "attention_mask": None, "mask_function": rule, **sizes}
        return LazyMask(self.implementation, **{**self.request, **changed})

    def _look_up(self, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """A rule for mask functions that take single elements only: made dense as transformers does it, then looked up."""
        dense = self.dense("sdpa")
        assert dense is not None
        return dense[row, 0, query - self.request["q_offset"], key - self.request["kv_offset"]]

    def dense(self, implementation: str) -> Tensor | None:
        """The mask as the named attention implementation of transformers wants it."""
        if implementation not in self._dense:
            make = AttentionMaskInterface()[implementation]
            self._dense[implementation] = make(**self.request)
        return self._dense[implementation]


def _window_of(rule: Callable[..., Any]) -> int | None:
    """The size of the sliding window if a mask function of transformers is one and causal besides, else None."""
    parts = inspect.getclosurevars(rule).nonlocals.get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    if not parts[0].__qualname__.startswith("sliding_window_overlay."):
        return None
    window: int = inspect.getclosurevars(parts[0]).nonlocals["sliding_window"]
    return window


def _shifted(rule: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """A mask function of transformers for what is that many rows further in its batch."""
    return lambda row, head, query, key: rule(row + rows, head, query, key)


def lazy_mask(implementation: str, **request: Any) -> LazyMask:
    """The function registered with transformers: a mask that was made before, by what contains the language model, is taken as
    it is, as transformers does with any of 4 dimensions.
    """
    given = request.get("attention_mask")
    return given if isinstance(given, LazyMask) else LazyMask(implementation, **request)


def _made(part: Any) -> Any:
    """The same arguments with tensors in place of masks."""
    if type(part) is LazyMask:
        return part.made()
    if type(part) in (tuple, list):
        return type(part)(_made(one) for one in part)
    return {name: _made(one) for name, one in part.items()} if type(part) is dict else part


def _through(name: str) -> Callable[..., Any]:
    def operate(self: LazyMask, *others: Any) -> Any:
        return getattr(self.made(), name)(*_made(others))

    return operate


OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "and", "rand", "or", "ror", "xor", "rxor", "invert", "neg"),
    *("eq", "ne", "lt", "le", "gt", "ge", "len", "iter", "bool"),
)
for _name in OPERATORS:  # which are looked up on the class, not by `__getattr__`
    setattr(LazyMask, f"__{_name}__", _through(f"__{_name}__"))
