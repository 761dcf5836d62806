"""From streams of keys or values to a quantizer: ranges first, then the codebook."""

from dataclasses import replace

import torch
from torch import Tensor

from narrowkv.calibration.distributed import Group
from narrowkv.calibration.kmeans import optimal_codebook
from narrowkv.calibration.statistics import TILE_NUMBERS, CodebookHistogram, Quantiles
from narrowkv.codec import AnyQuantizer, Quantizer, Scheme, quantizer_for
from narrowkv.codec.datatypes import boundaries, uniform
from narrowkv.codec.ranges import require_finite, to_scale_zero


class Fit:
    """Learns one scheme of one tensor of one layer in two passes over the data: `observe_range`, then `observe_codebook`.

    Sinks and padding must be left out by the caller.
    """

    def __init__(self, scheme: Scheme):
        self.scheme = scheme
        self.needs_range = scheme.static or scheme.outliers.by_matrix or scheme.transform.smooth_alpha > 0
        self.needs_codebook = scheme.datatype == "nuq"
        self.needs_gradient = self.needs_codebook and scheme.quantization.weighting != "none"
        self.quantiles = Quantiles()
        self.histogram = CodebookHistogram()
        self._ranges: Quantizer | None = None

    def observe_range(self, x: Tensor) -> None:
        """First pass. x: [tokens, kv_heads, head_dim]. Raises ActivationError on NaN and infinity."""
        require_finite("Keys or values", x)
        if self.needs_range:
            self.quantiles.add(x.flatten(1))

    def observe_codebook(self, x: Tensor, gradient: Tensor | None) -> None:
        """Second pass, after all of the first. x: [tokens, kv_heads, head_dim]; gradient of the loss: the same shape, or
        None for weights of 1. Weights are F s^2 with F the squared gradient (KVQuant, section 3.3 and appendix E).
        """
        if not self.needs_codebook:
            return
        if gradient is not None:
            require_finite("Gradients", gradient)
        ranges = self.ranges(x.shape[1:])
        step = max(TILE_NUMBERS // (x.shape[1] * x.shape[2]), 1)
        for start in range(0, len(x), step):
            elements = x[start : start + step].float().transpose(0, 1)[None]  # [1, kv_heads, tokens, head_dim]
            normalized, scale = ranges.normalize(elements)
            weight = None
            if self.needs_gradient and gradient is not None:
                weight = gradient[start : start + step].float().transpose(0, 1)[None].square()
                if self.scheme.quantization.weighting == "fisher_scaled":
                    weight *= scale**2
                weight = weight.transpose(1, 2).flatten()  # in the order in which it lies in memory
            self.histogram.add(normalized.transpose(1, 2).flatten(), weight)

    def merge_ranges(self, group: Group) -> None:
        """After the first pass: take in what the other processes of a group have seen."""
        if self.needs_range:
            self.quantiles.merge(group)

    def merge_codebook(self, group: Group) -> None:
        """After the second pass: take in what the other processes of a group have seen."""
        if self.needs_codebook:
            self.histogram.merge(group)

    def ranges(self, shape: tuple[int, ...]) -> Quantizer:
        """The quantizer with its ranges and an evenly spaced codebook. shape: kv_heads, head_dim."""
        if self._ranges is None:
            tables = self._static_tables(shape) if self.needs_range else {}
            placeholder = uniform(self.scheme.code_bits) if self.needs_codebook else None
            self._ranges = Quantizer(self.scheme, codebook=placeholder, **tables)
        return self._ranges

    def _static_tables(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Thresholds (KVQuant, section 3.4) and, for channels, the ranges between them; or smoothing factors."""
        scheme, quantiles = self.scheme, self.quantiles
        if scheme.transform.smooth_alpha:
            extent = torch.maximum(quantiles.smallest.abs(), quantiles.largest.abs())
            return {"smooth": smoothing(extent.view(shape), scheme.transform.smooth_alpha)}
        matrix = scheme.outliers.by_matrix
        tail = scheme.outliers.fraction / 2
        tables: dict[str, Tensor] = {}
        if scheme.outliers.fraction == 0:
            lower, upper = quantiles.smallest, quantiles.largest
        else:
            lower, upper = quantiles.quantile(tail, pooled=matrix), quantiles.quantile(1 - tail, pooled=matrix)
            form = (1, 1) if matrix else shape
            tables = {"lower": lower.view(form).clone(), "upper": upper.view(form).clone()}
        if scheme.static:
            if matrix:
                lower, upper = quantiles.smallest.clamp(lower, upper), quantiles.largest.clamp(lower, upper)
            scale, zero = to_scale_zero(lower.view(shape), upper.view(shape))
            tables |= {"scale": scale.contiguous(), "zero": zero.contiguous()}
        return tables

    def quantizer(self, shape: tuple[int, ...], scheme: Scheme) -> AnyQuantizer:
        """The finished quantizer. shape: kv_heads, head_dim. scheme: this fit's, or one that differs from it only in bits
        or Q-Norm, which the two passes do not depend on.
        """
        if not scheme.needs_calibration:
            return quantizer_for(scheme)
        ranges = self.ranges(shape)
        if not self.needs_codebook:
            return ranges
        histogram = self.histogram
        weight = histogram.weight if histogram.weight.sum() > 0 else histogram.count
        codebook = torch.from_numpy(optimal_codebook(histogram.centers.numpy(), weight.numpy(), 2**scheme.code_bits))
        borders = boundaries(codebook)
        if scheme.quantization.qnorm:
            codebook = q_norm(codebook, borders, histogram)
        return replace(ranges, scheme=scheme, codebook=codebook.float(), boundaries=borders.float())


def smoothing(extent: Tensor, power: float) -> Tensor:
    """Factors that channels are divided by: the larger extent of each pair d, d + head_dim / 2, to this power (SmoothQuant,
    arXiv 2211.10438, equation 4, without the other side's part), over their geometric mean in the head.

    extent: [kv_heads, head_dim], largest magnitude of each channel. Returns the same shape.
    """
    pairs = extent.unflatten(-1, (2, -1)).amax(-2)
    least = (1e-3 * pairs.amax(-1, keepdim=True)).clamp(min=1e-5)  # a channel that was silent so far may speak up
    logarithm = power * torch.maximum(pairs, least).log()
    return (logarithm - logarithm.mean(-1, keepdim=True)).exp().repeat(1, 2)


def q_norm(codebook: Tensor, borders: Tensor, histogram: CodebookHistogram) -> Tensor:
    """Shift and scale the levels so that the rounded elements keep their mean and standard deviation (KVQuant v1).

    The codes are still chosen with the borders of the levels as fitted. codebook: [levels]; returns the same shape.
    """
    share = histogram.count / histogram.count.sum().clamp(min=1)
    rounded = codebook[torch.bucketize(histogram.centers, borders)]
    mean, mean_rounded = (share * histogram.centers).sum(), (share * rounded).sum()
    deviation = (share * (histogram.centers - mean) ** 2).sum().sqrt()
    deviation_rounded = (share * (rounded - mean_rounded) ** 2).sum().sqrt()
    scale = deviation / deviation_rounded if deviation_rounded > 0 else torch.tensor(1.0, dtype=torch.float32, device="cpu")
    return (codebook - mean_rounded) * scale + mean
