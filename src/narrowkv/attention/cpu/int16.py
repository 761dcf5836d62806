"""Codebooks in int16, as the compiled attention multiplies them for models that compute in 16 bits.

Products of words are added up in 32 bits: a sum over head_dim for keys, over some hundred tokens for values. A query, or the
weights of tokens, become words as large as the largest such sum allows; outliers are added in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.codec import Scheme
from narrowkv.store import BLOCK

ONE = 2**15 - 1  # cosine of 0
LARGEST_KEY = 23_170  # rotated by 45 degrees, a pair of them still fits
LARGEST_VALUE = 2**13 - 1  # the larger they are, the smaller are the weights that they allow
FEWEST_LEVELS = 16
ROWS = (64, 128, 256)  # how many codes a row of tokens may have

INT16, AVX2_INT16 = "int16", "avx2-int16"  # kernels that multiply int16; the second one reads trellis-coded streams alone
SUPPORTED = {"avx512", "avx512vbmi", "avx512vbmi2", "avx512vnni", "gfni"} <= set(_kernels.instruction_sets())  # by INT16
AVX2_SUPPORTED = "avx2" in _kernels.instruction_sets()
STREAM_KERNELS = [*([INT16] if SUPPORTED else []), *([AVX2_INT16] if AVX2_SUPPORTED else [])]  # of streams, fastest first


@dataclass(frozen=True)
class Int16Codebook:
    """table: codebooks, repeated to have 16 levels, int16 [..., levels].
    unit: [kv_heads, head_dim] or [1] float32, what a word of 1 stands for. most: the largest word.
    """

    table: Tensor
    unit: Tensor
    most: int


def int16_codebook(
    codebooks: Tensor, scheme: Scheme, keys: bool, head_dim: int, rotary: tuple[int, bool]
) -> Int16Codebook | None:
    """Codebooks as words; None where the kernel does not read such a scheme in words.

    codebooks: [levels] normalized, or of keys [kv_heads, head_dim, levels] in real units, float32. rotary: how many pairs of
    channels of keys the rotary embedding rotates, and whether they are neighbors.
    """
    if not supports(scheme, keys, head_dim, rotary):
        return None
    levels = codebooks[..., : 2**scheme.code_bits]
    shared = levels.dim() == 1
    largest = levels.abs().amax(-1, keepdim=shared)
    largest = largest if shared else _pair_maximum(largest, *rotary)
    most = LARGEST_KEY if keys else LARGEST_VALUE
    unit = largest.clamp(min=torch.finfo(torch.float32).tiny * most) / most
    words = (levels / (unit if shared else unit[..., None])).round().short()
    words = words.repeat(*[1] * (words.dim() - 1), max(FEWEST_LEVELS // words.shape[-1], 1))
    return Int16Codebook(words.contiguous(), unit.contiguous(), most)


def _pair_maximum(largest: Tensor, pairs: int, interleaved: bool) -> Tensor:
    """The larger one of each pair of channels that rotate together, [kv_heads, head_dim]."""
    rotary, rest = largest[:, : 2 * pairs], largest[:, 2 * pairs :]
    form = (pairs, 2) if interleaved else (2, pairs)
    dim = 2 if interleaved else 1
    larger = rotary.unflatten(1, form).amax(dim, keepdim=True).expand(-1, *form) if pairs else rotary
    return torch.cat([larger.flatten(1), rest], dim=1)


def supports(scheme: Scheme, keys: bool, head_dim: int, rotary: tuple[int, bool]) -> bool:
    """Whether the kernel knows how codes lie and are ranged, and the processor has its instructions."""
    if not SUPPORTED or scheme.datatype in ("exact", "trellis"):
        return False
    if scheme.code_bits > 4:
        return False
    if keys and scheme.static:
        return True
    if rotary[0] or scheme.static:
        return False
    tokens, channels = (scheme.range_forms(1, BLOCK, head_dim)["scale"][0])[1:]
    if keys:
        return tokens in (1, 2) or (tokens == BLOCK and head_dim // 2 % channels == 0)
    return tokens == BLOCK and head_dim // channels % 32 == 0 and head_dim in ROWS


def int16_angles(steps: Tensor) -> dict[str, Tensor]:
    """Cosines and sines of the positions 0 to 63, [64, 2, pairs], as words.

    words: [pairs, 2, 64] int16, of 32 positions the even ones first. lanes: [2 * pairs * 64 + 2] int32, two words each: what
    1 becomes that is the first number of a pair, for all pairs and positions; the second; and either where nothing rotates.
    """
    rounded = (steps.permute(2, 1, 0) * ONE).round().short()  # [pairs, 2, 64]
    words = rounded.unflatten(2, (2, BLOCK // 4, 2)).transpose(3, 4).flatten(2)
    cos, sin = rounded.unbind(1)
    still = torch.tensor([[ONE, 0], [0, ONE]], dtype=torch.int16, device="cpu")
    lanes = torch.cat([torch.stack(pair, dim=-1).reshape(-1, 2) for pair in ((cos, sin), (-sin, cos))] + [still])
    return {"int16": words.contiguous(), "lanes": lanes.contiguous().view(torch.int32).flatten()}
