"""Whole heads around the kernels: rotations folded into queries and outputs, and what a bias adds to scores."""

from typing import cast

import torch
from torch import Tensor

from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.codec import AnyQuantizer, Quantizer, hadamard
from narrowkv.store import BLOCK
from narrowkv.store.bias import Bias


def rotate_query(quantizer: AnyQuantizer, matrix: Tensor | None, query: Tensor) -> Tensor:
    """Queries [batch, query_heads, queries, head_dim] as the codes of the keys see them: q K^T = (q T) (K T)^T.

    matrix: that of the quantizer, by `head_rotation`.
    """
    query = query if matrix is None else _by_head(query, matrix)
    return hadamard.rotate(query).contiguous() if quantizer.scheme.transform.hadamard else query


def unrotate_output(quantizer: AnyQuantizer, matrix: Tensor | None, total: Tensor) -> Tensor:
    """Sums of values [batch, query_heads, queries, head_dim] as their codes see them, rotated back."""
    total = hadamard.rotate_back(total) if quantizer.scheme.transform.hadamard else total
    return total if matrix is None else _by_head(total, matrix.mT)


def rotate_value_bias(quantizer: AnyQuantizer, matrix: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A bias of values [kv_heads, head_dim] as their codes see them."""
    if bias is None or (matrix is None and not quantizer.scheme.transform.hadamard):
        return bias
    rotated = bias[None, :, None] if matrix is None else torch.linalg.solve(matrix, bias[..., None]).mT[None]
    return (hadamard.rotate(rotated) if quantizer.scheme.transform.hadamard else rotated)[0, :, 0].contiguous()


def head_rotation(quantizer: AnyQuantizer) -> Tensor | None:
    """What codes stand for, rotated back by Hadamard, times this matrix [kv_heads, head_dim, head_dim] transposed, are the
    elements; None if they are.
    """
    smooth = quantizer.smooth if isinstance(quantizer, Quantizer) else None
    return None if smooth is None else torch.diag_embed(smooth)


def bias_scores(query: Tensor, bias: Bias, first: int, tokens: int, scaling: float) -> Tensor | None:
    """What the bias that was taken out of keys adds to the scores of packed tokens; None where there is none.

    query: [batch, query_heads, queries, head_dim], rotated. first: the first of these tokens. Returns [batch, query_heads,
    queries, tokens] float32. Where positions follow each other, cosines and sines are those of every 64th token: what rotates
    from there on is the same for all.
    """
    if bias.keys is None:
        return None
    x, rope = scaling * query.float().reshape(len(query), len(bias.keys), -1, query.shape[-1]), cast(AnyRope | None, bias.rope)
    if rope is None or bias.position_buffer is None:
        return (x @ bias.keys[..., None]).expand(-1, -1, -1, tokens).reshape(*query.shape[:3], tokens).contiguous()
    starts = bias.position_buffer.starts(first, first + tokens) if isinstance(rope, Rope) else None
    rope_state = bias.position_buffer.read(first, first + tokens) if starts is None else starts
    cos, sin = (part.float() for part in rope.cos_sin(rope_state, precise=True))
    pairs = cos.shape[-1]
    (x1, x2), (b1, b2) = (_in_pairs(part, pairs, rope.interleaved) for part in (x, bias.keys[:, None]))
    along, across = x1 * b1 + x2 * b2, x2 * b1 - x1 * b2  # [batch, kv_heads, rows, pairs]
    if isinstance(rope, Rope) and starts is not None:
        cos, sin, along, across = cos[:, None, None], sin[:, None, None], along[..., None, :], across[..., None, :]
        rotated = torch.cat([along * cos + across * sin, across * cos - along * sin], dim=-1)
        found = (rotated @ _within_block(rope.inverse_frequencies)).flatten(3)[..., :tokens]
    else:
        found = torch.cat([along, across], dim=-1) @ torch.cat([cos, sin], dim=-1)[:, None].mT
    if 2 * pairs < x.shape[-1]:
        found = found + x[..., 2 * pairs :] @ bias.keys[:, 2 * pairs :, None]
    return found.reshape(*query.shape[:3], tokens).contiguous()


def _within_block(inverse_frequencies: Tensor) -> Tensor:
    """Cosines and sines by which 64 tokens of a block rotate from its first: [2 pairs, 64] float32."""
    angles = inverse_frequencies.double()[:, None] * torch.arange(BLOCK, device=inverse_frequencies.device, dtype=torch.int64)
    return torch.cat([angles.cos(), angles.sin()]).float()


def _in_pairs(x: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two elements of each pair of channels that rotate together, [..., pairs] each."""
    rotary_part = x[..., : 2 * pairs]
    return (
        (rotary_part[..., ::2], rotary_part[..., 1::2])
        if interleaved
        else (rotary_part[..., :pairs], rotary_part[..., pairs:])
    )


def _by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """x [batch, query_heads, n, head_dim] times the matrix [kv_heads, head_dim, head_dim] of its KV head."""
    grouped = x.view(len(x), len(matrix), -1, x.shape[-1])
    return (grouped @ matrix).view(x.shape)
