"""Codebooks that need no calibration, all over the normalized range [-1, 1], and the boundaries between their levels."""

import torch
from torch import Tensor


def uniform(bits: int) -> Tensor:
    """Evenly spaced levels: with scale (max - min) / 2 and zero (max + min) / 2 this is asymmetric integer rounding
    whose zero point stays in floating point. Returns [2**bits] float32.
    """
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float32, device="cpu")


def normal_float(bits: int) -> Tensor:
    """NormalFloat levels (QLoRA, section 3): quantiles of the normal distribution, with an exact zero, scaled to [-1, 1].

    2**(bits - 1) levels are at or above zero's positive side and 2**(bits - 1) below or at zero; the two zeros are one.
    Returns [2**bits] float32, ascending.
    """
    half = 2 ** (bits - 1)
    offset = (1 - 1 / (2 * 2**bits) + 1 - 1 / (2 * (2**bits - 1))) / 2
    positive = torch.special.ndtri(torch.linspace(0.5, offset, half + 1, dtype=torch.float64, device="cpu"))
    negative = -torch.special.ndtri(torch.linspace(0.5, offset, half, dtype=torch.float64, device="cpu")[1:]).flip(0)
    return torch.cat([negative / negative.abs().max(), positive / positive.max()]).float()


def floating_point(bits: int) -> Tensor:
    """Levels of small floating-point elements, scaled to [-1, 1]: e2m1 with 4 bits, e4m3 with 8 (the NaNs left out).

    Zero is there twice, and with 8 bits the largest too, as the codes are. Returns [2**bits] float32, ascending.
    """
    if bits == 4:
        magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32, device="cpu")
    else:
        magnitudes = torch.arange(128, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float().nan_to_num(448.0)
    return torch.cat([-magnitudes.flip(0), magnitudes]) / magnitudes[-1]


def boundaries(codebook: Tensor) -> Tensor:
    """Mid-points between neighboring levels: an element above boundary i and not above boundary i + 1 has code i + 1.

    codebook: [..., levels] ascending. Returns [..., levels - 1].
    """
    return (codebook[..., 1:] + codebook[..., :-1]) / 2
