"""What kernels of any device have in common: which schemes they read, and turns of whole heads around them."""

import functools

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer, PointQuantizer, Quantizer, Scheme, hadamard
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import BLOCK


@functools.cache
def why_unread(scheme: Scheme) -> str | None:
    """Why the kernel does not read a scheme; None if it does."""
    forms = scheme.range_forms(1, BLOCK, BLOCK)
    if any(name not in ("scale", "zero") or dtype != torch.float16 for name, (_, dtype) in forms.items()):
        return f"does not read {scheme.datatype} codes ranged by {', '.join(forms)}"
    if scheme.pre_rope and (scheme.hadamard or scheme.smooth):
        return "cannot undo a Hadamard rotation or smoothing of keys kept unrotated"
    return None


def require_read(backend: str, quantizers: tuple[AnyQuantizer, ...]) -> None:
    """Raise UnsupportedModelError where the kernels of a backend do not read such a cache."""
    for quantizer in quantizers:
        if why := why_unread(quantizer.scheme):
            raise UnsupportedModelError(f"Backend {backend} {why}; choose backend torch.")


def turn_query(quantizer: AnyQuantizer, matrix: Tensor | None, query: Tensor) -> Tensor:
    """Queries [batch, query_heads, queries, head_dim] as the codes of the keys see them: q K^T = (q T) (K T)^T.

    matrix: that of the quantizer, by `matrix_of`.
    """
    if quantizer.scheme.hadamard:
        return hadamard.rotate(query).contiguous()
    return query if matrix is None else _by_head(query, matrix)


def turn_sum(quantizer: AnyQuantizer, matrix: Tensor | None, total: Tensor) -> Tensor:
    """Sums of values [batch, query_heads, queries, head_dim] as their codes see them, turned back."""
    if quantizer.scheme.hadamard:
        return hadamard.rotate_back(total)
    return total if matrix is None else _by_head(total, matrix.mT)


def matrix_of(quantizer: AnyQuantizer) -> Tensor | None:
    """What codes stand for, times this matrix [kv_heads, head_dim, head_dim] transposed, are the numbers; None if they are."""
    if isinstance(quantizer, PointQuantizer):
        return None if quantizer.turn is None else quantizer.turn.float()
    smooth = quantizer.smooth if isinstance(quantizer, Quantizer) else None
    return None if smooth is None else torch.diag_embed(smooth)


def _by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """x [batch, query_heads, n, head_dim] times the matrix [kv_heads, head_dim, head_dim] of its KV head."""
    grouped = x.view(len(x), len(matrix), -1, x.shape[-1])
    return (grouped @ matrix).view(x.shape)
