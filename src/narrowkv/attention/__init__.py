"""Attention over the packed cache: one function, one file per device."""

from collections.abc import Callable

from torch import Tensor

from narrowkv.attention import naive
from narrowkv.attention.rope import Rope

BACKENDS: dict[str, Callable[..., Tensor]] = {"naive": naive.attend}

__all__ = ["BACKENDS", "Rope"]
