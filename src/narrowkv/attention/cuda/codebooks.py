"""Codebooks and fixed ranges as kernels on a GPU read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer, Quantizer
from narrowkv.errors import UnsupportedModelError
from narrowkv.store.page import is_channel_major

FOLDED_BITS = 4
COPIES = 32  # of a codebook that all share
LARGEST = 46_000  # of elements in 16 bits: like those of `unpack`


@dataclass(frozen=True)
class CodebookSet:
    """Codebooks and fixed ranges of one side as kernels read them, float32, and by what its head is rotated.

    table: [heads, head_dim, levels] or [levels]; scale, zero: [heads, head_dim]. bytes: the table's elements in float16, the
    lower bytes of all levels before the higher, [heads, head_dim, levels / 2] int32, or [32, levels / 2] of one that all
    share; None of more than 16 levels.
    """

    table: Tensor | None = None
    bytes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None


def folds(quantizer: AnyQuantizer, channel_major: bool) -> bool:
    """Whether fixed ranges of channels go into a codebook for each of them, which saves a multiplication."""
    return channel_major and quantizer.scheme.static and quantizer.scheme.bits <= FOLDED_BITS


def codebooks_of(quantizer: AnyQuantizer, keys: bool) -> CodebookSet:
    """Its tables."""
    if not isinstance(quantizer, Quantizer) or quantizer.codebook is None:
        return CodebookSet()
    table = quantizer.codebook.float().contiguous()
    if quantizer.scale is None or quantizer.zero is None:
        return CodebookSet(table, _bytes(table))
    if folds(quantizer, is_channel_major(quantizer.scheme, keys)):
        levels = table * quantizer.scale[..., None] + quantizer.zero[..., None]
        return CodebookSet(levels.contiguous(), _bytes(levels))
    return CodebookSet(table, _bytes(table), quantizer.scale.contiguous(), quantizer.zero.contiguous())


def _bytes(table: Tensor) -> Tensor | None:
    """As `CodebookSet.bytes` has it, of a table [..., levels]; raises UnsupportedModelError, see `_halves`."""
    if table.shape[-1] > 16:
        return None
    parts = _halves(table)[..., None].view(torch.uint8)  # [..., levels, 2], lower bytes first
    words = parts.transpose(-1, -2).flatten(-2).contiguous().view(torch.int32)
    return words.repeat(COPIES, 1) if table.dim() == 1 else words


def _halves(table: Tensor) -> Tensor:
    """A table in float16; raises UnsupportedModelError for elements that would overflow when keys are rotated."""
    largest = table.abs().max().item()
    if largest > LARGEST:
        raise UnsupportedModelError(
            f"Backend cuda reads elements of up to {LARGEST:,}, and a codebook has {largest:,.0f}; choose backend torch."
        )
    return table.half().contiguous()
