"""Attention over the packed cache: one function, one file per backend."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from narrowkv.attention import naive, tiled
from narrowkv.attention.cpu import decode as cpu
from narrowkv.attention.cpu.int16 import SUPPORTED
from narrowkv.attention.cuda import decode as cuda
from narrowkv.attention.inputs import AttentionInputs
from narrowkv.attention.mask import AttentionMask
from narrowkv.attention.rope import AnyRope, Rope, StoredRope
from narrowkv.attention.support import unsupported_reason
from narrowkv.codec import Scheme
from narrowkv.defaults import AUTO
from narrowkv.store import LayerStore

BACKENDS: dict[str, Callable[[AttentionInputs, LayerStore], Tensor]] = {
    "cpu": cpu.attend,
    "cuda": cuda.attend,
    "torch": tiled.attend,
    "naive": naive.attend,
}


def attend_each(backend: str, parts: Sequence[tuple[AttentionInputs, LayerStore]]) -> list[Tensor]:
    """A backend's attention of several sequences of any lengths; `cpu` reads all of them in one call."""
    if backend == "cpu":
        return cpu.attend_each(parts)
    return [BACKENDS[backend](inputs, store) for inputs, store in parts]


def resolve_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    schemes: list[tuple[Scheme, Scheme]],
    biased: bool = False,
    stored: bool = False,
) -> str:
    """The backend meant: AUTO is `cpu` or `cuda` where it runs and reads all schemes, else `torch`; others are themselves.

    biased: whether projections of the model add a bias to keys or values. stored: whether a rotary embedding of it is a
    StoredRope.
    """
    if backend != AUTO:
        return backend
    fits = device.type == "cpu" or (device.type == "cuda" and cuda.runs_on(device))
    fits = fits and not (device.type == "cuda" and biased and any(part.takes_bias_out for pair in schemes for part in pair))
    supported = dtype != torch.float64 and not any(
        unsupported_reason(device.type, scheme, keys, biased, stored)
        for pair in schemes
        for scheme, keys in zip(pair, (True, False), strict=True)
    )
    return device.type if fits and supported else "torch"


def describe_backend(backend: str, int16: bool, in_torch: Sequence[str] = ()) -> str:
    """A backend's name and, where it is compiled, for what: `cpu (avx512)`.

    int16: whether codes become int16. in_torch: what is encoded in plain torch, of keys and values.
    """
    slow = f", {' and '.join(in_torch)} encoded in torch" if in_torch and backend in ("cpu", "cuda") else ""
    if backend != "cpu":
        return f"{backend}{slow}"
    if not int16:
        return f"cpu ({cpu.KERNELS[0]}){slow}"
    return f"cpu ({'avx512' if SUPPORTED else 'avx2'}, int16){slow}"


__all__ = [
    "AUTO",
    "BACKENDS",
    "AnyRope",
    "AttentionInputs",
    "AttentionMask",
    "Rope",
    "StoredRope",
    "attend_each",
    "describe_backend",
    "resolve_backend",
]
