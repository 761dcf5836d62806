"""What kernels of any device have in common: which schemes they read, and turns of whole heads around them."""

import functools

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer, PointQuantizer, Quantizer, Scheme, hadamard
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import BLOCK, LayerStore


@functools.cache
def why_unread(scheme: Scheme, biased: bool = False) -> str | None:
    """Why the kernel does not read a scheme; None if it does. biased: keys of a model whose projections add a bias."""
    forms = scheme.range_forms(1, BLOCK, BLOCK)
    if any(name not in ("scale", "zero") or dtype != torch.float16 for name, (_, dtype) in forms.items()):
        return f"does not read {scheme.datatype} codes ranged by {', '.join(forms)}"
    if scheme.pre_rope and (scheme.hadamard or scheme.smooth):
        return "cannot undo a Hadamard rotation or smoothing of keys kept unrotated"
    if biased and scheme.pre_rope and scheme.takes_bias_out:
        return "cannot put back what the projection adds to keys kept unrotated"
    return None


def require_read(backend: str, store: LayerStore) -> None:
    """Raise UnsupportedModelError where the kernels of a backend do not read such a cache."""
    for quantizer in store.quantizers:
        if why := why_unread(quantizer.scheme, store.bias.keys is not None):
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


def turn_value_bias(quantizer: AnyQuantizer, matrix: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A bias of values [kv_heads, head_dim] as their codes see them."""
    if bias is None or (matrix is None and not quantizer.scheme.hadamard):
        return bias
    turned = bias[None, :, None] if matrix is None else torch.linalg.solve(matrix, bias[..., None]).mT[None]
    return (hadamard.rotate(turned) if quantizer.scheme.hadamard else turned)[0, :, 0].contiguous()


def matrix_of(quantizer: AnyQuantizer) -> Tensor | None:
    """What codes stand for, times this matrix [kv_heads, head_dim, head_dim] transposed, are the numbers; None if they are."""
    if isinstance(quantizer, PointQuantizer):
        return None if quantizer.turn is None else quantizer.turn.float()
    smooth = quantizer.smooth if isinstance(quantizer, Quantizer) else None
    return None if smooth is None else torch.diag_embed(smooth)


def offsets_of(query: Tensor, constant: Tensor | None, scaling: float) -> Tensor | None:
    """What the bias that was taken out of blocks of keys adds to the scores of their tokens.

    query: [batch, query_heads, queries, head_dim], rotated. constant: [batch or 1, kv_heads, blocks, head_dim] float32, as
    `store.bias` has it. Returns [batch, query_heads, queries, blocks] float32.
    """
    if constant is None:
        return None
    grouped = query.float().reshape(len(query), constant.shape[1], -1, query.shape[-1])
    return (scaling * grouped @ constant.mT).view(*query.shape[:3], -1)


def _by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """x [batch, query_heads, n, head_dim] times the matrix [kv_heads, head_dim, head_dim] of its KV head."""
    grouped = x.view(len(x), len(matrix), -1, x.shape[-1])
    return (grouped @ matrix).view(x.shape)
