"""Attention over the packed cache: one function, one file per backend."""

from collections.abc import Callable

from torch import Tensor

from narrowkv.attention import cpu, naive, tiled
from narrowkv.attention.rope import AnyRope, Rope, StoredRope
from narrowkv.attention.visible import Visible

BACKENDS: dict[str, Callable[..., Tensor]] = {"cpu": cpu.attend, "torch": tiled.attend, "naive": naive.attend}


def described(backend: str) -> str:
    """A backend's name and, where it is compiled, for which instruction set: `cpu (avx512)`."""
    return f"cpu ({cpu.KERNELS[0]})" if backend == "cpu" else backend


__all__ = ["BACKENDS", "AnyRope", "Rope", "StoredRope", "Visible", "described"]
