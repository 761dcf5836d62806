"""From streams of keys or values to the transform, the rates and the tables of trellis-coded streams."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from narrowkv.calibration.rates import squared_errors
from narrowkv.calibration.samples import SampleFit
from narrowkv.calibration.statistics import metric_axes, quantile
from narrowkv.calibration.trellis_tables import learned_tables, on_grid
from narrowkv.codec import Scheme, TrellisQuantizer
from narrowkv.codec.frames import Frames, index_dtype
from narrowkv.codec.gaussian_tables import STEPS, gaussian_tables
from narrowkv.codec.pairs import from_pairs, to_pairs
from narrowkv.codec.ranges import to_16_bits
from narrowkv.codec.scheme_parts import UNIT
from narrowkv.codec.trellis import rates_of

SHRINKAGE = 0.03  # of the mean cost of a head's coefficients, added to each: on other text the cheap ones are not as cheap
SEARCH_COST = 16 * 2**12  # of what a typical coefficient misses by, in 1 / 2^16 of a squared grid step
ROUNDS, LEARNING_TOKENS, LIMIT_TOKENS = 2, 800, 2048


@dataclass(frozen=True)
class Transform:
    """What makes coefficients of a tensor's heads.

    matrix: [kv_heads, head_dim, head_dim], coefficients times this are the channels; of pairs
    [kv_heads, head_dim / 2, 2, 2]. cost: [kv_heads, head_dim], of leaving a coefficient out. All float64.
    """

    matrix: Tensor
    cost: Tensor

    def unit_costs(self) -> Tensor:
        """Costs of units of 8 coefficients, summed over heads, dearest first: [head_dim / 8]."""
        return self.cost.sort(-1, descending=True).values.sum(0).unflatten(0, (-1, UNIT)).sum(1)


class TrellisFit(SampleFit):
    """Learns all trellis-coded schemes of one tensor of one layer, in the second of the passes that `Fit` has.

    frames: in which keys before the rotary embedding are rotated; None for values. What a token's keys and gradients are does
    not depend on its offset in a frame, so a token of the sample counts for the offset that it has there.
    """

    def __init__(self, frames: Frames | None = None) -> None:
        super().__init__()
        self.frames = frames
        self._transforms: dict[bool, Transform] = {}
        self._quantizers: dict[Scheme, TrellisQuantizer] = {}

    def observe_drawn(self, gradient: Tensor) -> None:
        """The same tokens' gradients [tokens, kv_heads, head_dim] of the loss on tokens drawn from the model."""
        self.samples.add_gradient(gradient)

    @functools.cached_property
    def mean(self) -> Tensor:
        """Of each channel: [kv_heads, head_dim] float16."""
        return to_16_bits(self.samples.heads()[0].double().mean(1), torch.float16, "Means")

    def transform(self, whole: bool) -> Transform:
        """The transform of whole heads, or of pairs of channels d and d + head_dim / 2."""
        if whole not in self._transforms:
            x, fisher = self.samples.heads()[0].double(), self.samples.fisher()
            x = x - self.mean[:, None].double()
            if self.frames is not None:
                x, fisher = self.frames.rotate(x, 0), self.frames.rotate_moment(fisher)
            self._transforms[whole] = transform_of(x, fisher, whole)
        return self._transforms[whole]

    def quantizer(self, shape: tuple[int, ...], scheme: Scheme) -> TrellisQuantizer:
        """The finished quantizer of a scheme whose rates are allocated, learned once. shape: kv_heads, head_dim."""
        if scheme not in self._quantizers:
            self._quantizers[scheme] = self._fitted(shape, scheme)
        return self._quantizers[scheme]

    def _fitted(self, shape: tuple[int, ...], scheme: Scheme) -> TrellisQuantizer:
        assert scheme.quantization.counts is not None
        found, n = self.transform(scheme.transform.learned_rotation), scheme.outlier_positions(shape[1])
        order = found.cost.argsort(-1)[:, shape[1] - n :]  # cheapest first
        universal = gaussian_tables()
        steps = torch.tensor(STEPS, dtype=torch.float32, device="cpu")
        errors = squared_errors()
        cost = found.cost.gather(1, order)
        rates = rates_of(scheme.quantization.counts, errors.device)
        weight = cost * (SEARCH_COST / (cost * errors[rates]).median().clamp(min=torch.finfo(torch.float32).tiny))
        tables: dict[str, Tensor] = {}
        if scheme.transform.learned_rotation:
            rows = found.matrix.gather(1, order[..., None].expand(-1, -1, shape[1]))
            tables |= in_bytes(rows)
        else:
            tables |= {
                "pairs": to_16_bits(found.matrix, torch.float16, "Transforms"),
                "order": order.to(index_dtype(shape[1])),
            }
        if self.frames is not None:
            tables |= {"channels": self.frames.channels, "frequencies": self.frames.frequencies}
        if scheme.outliers.fraction:
            tables["outlier_threshold"] = torch.full((1,), torch.inf, dtype=torch.float32, device="cpu")
        start = TrellisQuantizer(
            scheme,
            mean=self.mean,
            entries=torch.stack([universal.high, universal.low], dim=1)[None],
            steps=steps,
            scales=_unbiased(steps, errors, scheme),
            weight=to_16_bits(weight, torch.bfloat16, "Weights"),
            **tables,
        )
        return with_outlier_threshold(self._learned(start, errors), self.samples.heads()[:, :, :LIMIT_TOKENS])

    def _learned(self, quantizer: TrellisQuantizer, errors: Tensor) -> TrellisQuantizer:
        """The same with tables learned on the layer's own coefficients."""
        x = self.samples.heads()
        assert quantizer.entries is not None and quantizer.steps is not None
        tables = quantizer.entries[0].float() * quantizer.steps[:, None, None]  # [rates, 2, 16]
        for seed in range(ROUNDS):
            generator = torch.Generator(device="cpu").manual_seed(seed)
            some = torch.randperm(x.shape[2], generator=generator, dtype=torch.int64, device="cpu")[:LEARNING_TOKENS].to(
                x.device
            )
            part = x[:, :, some]
            tables = learned_tables(quantizer, tables, part)
            entries, steps = on_grid(tables)
            quantizer = replace(
                quantizer, entries=entries[None], steps=steps, scales=_unbiased(steps, errors, quantizer.scheme)
            )
        return quantizer


def with_outlier_threshold(quantizer: TrellisQuantizer, x: Tensor) -> TrellisQuantizer:
    """The same with the cost above which coefficients are exact, so that of those of x [1, kv_heads, n, head_dim] the scheme's
    part are.
    """
    fraction = quantizer.scheme.outliers.fraction
    if not fraction:
        return quantizer
    return replace(quantizer, outlier_threshold=quantile(quantizer.cost(x).flatten(), 1 - fraction))


def in_bytes(rows: Tensor) -> dict[str, Tensor]:
    """Rows [kv_heads, n, head_dim] float64 of a transform as multiples of a step each, which is exact where what encodes is
    the inverse of what is stored.
    """
    steps = to_16_bits(rows.abs().amax(-1) / 127, torch.bfloat16, "Transforms")
    steps = steps.clamp(min=torch.finfo(torch.bfloat16).tiny)
    matrix = (rows / steps.double()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return {"matrix": matrix, "matrix_steps": steps}


def _unbiased(steps: Tensor, errors: Tensor, scheme: Scheme) -> Tensor:
    """Grid steps for decoding; of values so scaled that codes are right on average, since errors of tokens add up."""
    return steps / (1 - errors[1:]).float() if scheme.quantization.token_norm else steps.clone()


def transform_of(x: Tensor, fisher: Tensor, whole: bool) -> Transform:
    """The transform of tokens x [kv_heads, n, head_dim] less their mean, float64.

    fisher: what errors cost, [kv_heads, head_dim, head_dim] float64. Whole heads are rotated to the axes of their covariance
    in the metric of the loss; then pairs of channels, or of neighboring axes, each weighted by the root of what its errors
    cost, are whitened.
    """
    covariance, axes = x.mT @ x / x.shape[1], None
    if whole:
        axes = uncorrelated_axes(covariance, fisher)
        covariance, fisher = (axes.mT @ part @ axes for part in (covariance, fisher))
    weight = fisher.diagonal(dim1=1, dim2=2).clamp(min=1e-20).sqrt()
    half = x.shape[2] // 2
    weighted = covariance * weight[:, :, None] * weight[:, None]
    blocks = weighted.unflatten(2, (2, half)).unflatten(1, (2, half)).diagonal(dim1=2, dim2=4)  # [kv_heads, 2, 2, half]
    variances, vectors = torch.linalg.eigh(blocks.permute(0, 3, 1, 2))
    variances = variances.clamp(min=1e-20)
    variances = variances + SHRINKAGE * variances.mean((1, 2), keepdim=True)
    # [kv_heads, half, 2, 2]: coefficients times this are weighted pairs, then pairs
    pairs = variances.sqrt()[..., None] * vectors.mT / to_pairs(weight)[..., None, :]
    cost = from_pairs(variances)
    if axes is None:
        return Transform(pairs, cost)
    matrix = torch.zeros_like(axes).unflatten(1, (2, half)).unflatten(3, (2, half))
    at = torch.arange(half, dtype=torch.int64, device=x.device)
    matrix[:, :, at, :, at] = pairs.movedim(1, 0)
    return Transform(matrix.flatten(3, 4).flatten(1, 2) @ axes.mT, cost)


def uncorrelated_axes(covariance: Tensor, fisher: Tensor) -> Tensor:
    """[kv_heads, head_dim, head_dim]: axes of the covariance in the metric of the loss, dearest first, neighbors in pairs."""
    axes = metric_axes(covariance, fisher)
    cost = (axes.mT @ covariance @ axes).diagonal(dim1=1, dim2=2) * (axes.mT @ fisher @ axes).diagonal(dim1=1, dim2=2)
    axes = axes.gather(2, cost.argsort(-1, descending=True)[:, None].expand_as(axes))
    return torch.cat([axes[..., 0::2], axes[..., 1::2]], -1)
