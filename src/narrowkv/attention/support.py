"""What the kernels of a backend support: which schemes of keys and values they read."""

import functools

import torch

from narrowkv.attention.rope import AnyRope, StoredRope
from narrowkv.codec import Scheme
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import BLOCK, LayerStore


@functools.cache
def unsupported_reason(backend: str, scheme: Scheme, keys: bool, biased: bool = False, stored: bool = False) -> str | None:
    """Why the kernels of backend `cpu` or `cuda` do not read a scheme of keys or of values; None if they do.

    biased: keys of a model whose projections add a bias. stored: keys whose rotary embedding is a StoredRope.
    """
    if scheme.datatype == "trellis":
        return _streams_reason(scheme, keys, stored)
    forms = scheme.range_forms(1, BLOCK, BLOCK)
    if any(name not in ("scale", "zero") or dtype != torch.float16 for name, (_, dtype) in forms.items()):
        return f"does not read {scheme.datatype} codes ranged by {', '.join(forms)}"
    if scheme.transform.pre_rope and (scheme.transform.hadamard or scheme.transform.smooth_alpha):
        return "cannot undo a Hadamard rotation or smoothing of keys stored unrotated"
    if biased and scheme.transform.pre_rope and scheme.takes_bias_out:
        return "cannot put back what the projection adds to keys stored unrotated"
    return None


def _streams_reason(scheme: Scheme, keys: bool, stored: bool) -> str | None:
    """Why trellis-coded streams are not read; None if they are."""
    if keys and (scheme.transform.learned_rotation or scheme.quantization.token_norm):
        return "does not read trellis-coded keys that are rotated as whole heads or have norms"
    if keys and scheme.transform.pre_rope and stored:
        return "does not read trellis-coded keys of a rotary embedding whose angles are stored with each token"
    return None


def require_supported(backend: str, store: LayerStore, rope: AnyRope | None) -> None:
    """Raise UnsupportedModelError where the kernels of a backend do not read such a cache. rope: of its keys."""
    stored = isinstance(rope, StoredRope)
    for quantizer, keys in zip(store.quantizers, (True, False), strict=True):
        if why := unsupported_reason(backend, quantizer.scheme, keys, store.bias.keys is not None, stored):
            raise UnsupportedModelError(f"Backend {backend} {why}; choose backend torch.")
    if backend == "cuda" and len({scheme.datatype == "trellis" for scheme in store.schemes}) > 1:
        raise UnsupportedModelError("Backend cuda reads streams of both keys and values, or of none; choose backend torch.")
