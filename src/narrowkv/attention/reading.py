"""What kernels of any device have in common: which schemes they read, and turns of whole heads around them."""

import functools
from typing import cast

import torch
from torch import Tensor

from narrowkv.attention.rope import AnyRope, Rope, StoredRope
from narrowkv.codec import AnyQuantizer, Quantizer, Scheme, hadamard
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import BLOCK, LayerStore
from narrowkv.store.bias import Bias


@functools.cache
def why_unread(backend: str, scheme: Scheme, keys: bool, biased: bool = False, stored: bool = False) -> str | None:
    """Why the kernels of backend `cpu` or `cuda` do not read a scheme of keys or of values; None if they do.

    biased: keys of a model whose projections add a bias. stored: keys whose rotary embedding is a StoredRope.
    """
    if scheme.datatype == "trellis":
        return _why_no_streams(backend, scheme, keys, stored)
    forms = scheme.range_forms(1, BLOCK, BLOCK)
    if any(name not in ("scale", "zero") or dtype != torch.float16 for name, (_, dtype) in forms.items()):
        return f"does not read {scheme.datatype} codes ranged by {', '.join(forms)}"
    if scheme.pre_rope and (scheme.hadamard or scheme.smooth):
        return "cannot undo a Hadamard rotation or smoothing of keys kept unrotated"
    if biased and scheme.pre_rope and scheme.takes_bias_out:
        return "cannot put back what the projection adds to keys kept unrotated"
    return None


def _why_no_streams(backend: str, scheme: Scheme, keys: bool, stored: bool) -> str | None:
    """Why trellis-coded streams are not read; None if they are."""
    if backend != "cpu":
        return "does not read trellis-coded streams yet"
    if keys and (scheme.turn or scheme.token_norm):
        return "does not read trellis-coded keys that are turned as whole heads or have norms"
    if keys and scheme.pre_rope and stored:
        return "does not read trellis-coded keys of a rotary embedding whose angles are kept with each token"
    return None


def require_read(backend: str, store: LayerStore, rope: AnyRope | None) -> None:
    """Raise UnsupportedModelError where the kernels of a backend do not read such a cache. rope: of its keys."""
    stored = isinstance(rope, StoredRope)
    for quantizer, keys in zip(store.quantizers, (True, False), strict=True):
        if why := why_unread(backend, quantizer.scheme, keys, store.bias.keys is not None, stored):
            raise UnsupportedModelError(f"Backend {backend} {why}; choose backend torch.")


def turn_query(quantizer: AnyQuantizer, matrix: Tensor | None, query: Tensor) -> Tensor:
    """Queries [batch, query_heads, queries, head_dim] as the codes of the keys see them: q K^T = (q T) (K T)^T.

    matrix: that of the quantizer, by `matrix_of`.
    """
    query = query if matrix is None else _by_head(query, matrix)
    return hadamard.rotate(query).contiguous() if quantizer.scheme.hadamard else query


def turn_sum(quantizer: AnyQuantizer, matrix: Tensor | None, total: Tensor) -> Tensor:
    """Sums of values [batch, query_heads, queries, head_dim] as their codes see them, turned back."""
    total = hadamard.rotate_back(total) if quantizer.scheme.hadamard else total
    return total if matrix is None else _by_head(total, matrix.mT)


def turn_value_bias(quantizer: AnyQuantizer, matrix: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A bias of values [kv_heads, head_dim] as their codes see them."""
    if bias is None or (matrix is None and not quantizer.scheme.hadamard):
        return bias
    turned = bias[None, :, None] if matrix is None else torch.linalg.solve(matrix, bias[..., None]).mT[None]
    return (hadamard.rotate(turned) if quantizer.scheme.hadamard else turned)[0, :, 0].contiguous()


def matrix_of(quantizer: AnyQuantizer) -> Tensor | None:
    """What codes stand for, turned back by Hadamard, times this matrix [kv_heads, head_dim, head_dim] transposed, are the
    numbers; None if they are.
    """
    smooth = quantizer.smooth if isinstance(quantizer, Quantizer) else None
    return None if smooth is None else torch.diag_embed(smooth)


def offsets_of(query: Tensor, bias: Bias, first: int, tokens: int, scaling: float) -> Tensor | None:
    """What the bias that was taken out of keys adds to the scores of packed tokens; None where there is none.

    query: [batch, query_heads, queries, head_dim], rotated. first: the first of these tokens. Returns [batch, query_heads,
    queries, tokens] float32. Where positions follow each other, cosines and sines are those of every 64th token: what turns
    from there on is the same for all.
    """
    if bias.keys is None:
        return None
    x, rope = scaling * query.float().reshape(len(query), len(bias.keys), -1, query.shape[-1]), cast(AnyRope | None, bias.rope)
    if rope is None or bias.ledger is None:
        return (x @ bias.keys[..., None]).expand(-1, -1, -1, tokens).reshape(*query.shape[:3], tokens).contiguous()
    starts = bias.ledger.starts(first, first + tokens) if isinstance(rope, Rope) else None
    kept = bias.ledger.read(first, first + tokens) if starts is None else starts
    cos, sin = (part.float() for part in rope.cos_sin(kept, precise=True))
    pairs = cos.shape[-1]
    (x1, x2), (b1, b2) = (_in_pairs(part, pairs, rope.interleaved) for part in (x, bias.keys[:, None]))
    along, across = x1 * b1 + x2 * b2, x2 * b1 - x1 * b2  # [batch, kv_heads, rows, pairs]
    if isinstance(rope, Rope) and starts is not None:
        cos, sin, along, across = cos[:, None, None], sin[:, None, None], along[..., None, :], across[..., None, :]
        turned = torch.cat([along * cos + across * sin, across * cos - along * sin], dim=-1)
        found = (turned @ _within_block(rope.inverse_frequencies)).flatten(3)[..., :tokens]
    else:
        found = torch.cat([along, across], dim=-1) @ torch.cat([cos, sin], dim=-1)[:, None].mT
    if 2 * pairs < x.shape[-1]:
        found = found + x[..., 2 * pairs :] @ bias.keys[:, 2 * pairs :, None]
    return found.reshape(*query.shape[:3], tokens).contiguous()


def _within_block(inverse_frequencies: Tensor) -> Tensor:
    """Cosines and sines by which 64 tokens of a block turn from its first: [2 pairs, 64] float32."""
    angles = inverse_frequencies.double()[:, None] * torch.arange(BLOCK, device=inverse_frequencies.device, dtype=torch.int64)
    return torch.cat([angles.cos(), angles.sin()]).float()


def _in_pairs(x: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two numbers of each pair of channels that turn together, [..., pairs] each."""
    turning = x[..., : 2 * pairs]
    return (turning[..., ::2], turning[..., 1::2]) if interleaved else (turning[..., :pairs], turning[..., pairs:])


def _by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """x [batch, query_heads, n, head_dim] times the matrix [kv_heads, head_dim, head_dim] of its KV head."""
    grouped = x.view(len(x), len(matrix), -1, x.shape[-1])
    return (grouped @ matrix).view(x.shape)
