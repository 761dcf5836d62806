"""Fits against the formulas of the paper, computed at once over all data."""

import pytest
import torch

from narrowkv.calibration import Fit
from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme, Transform
from narrowkv.codec.ranges import outliers_per_tail

TOKENS, HEADS, DIM = 900, 2, 40


@pytest.fixture
def data():
    x = torch.randn(TOKENS, HEADS, DIM) * (torch.rand(HEADS, DIM) * 4 + 0.2) + torch.randn(HEADS, DIM)
    return x, torch.randn_like(x) * torch.rand(TOKENS, 1, 1)


def run(scheme, x, gradient):
    fit = Fit(scheme)
    for part in x.split(250):
        fit.observe_range(part)
    for part, slope in zip(x.split(250), gradient.split(250), strict=True):
        fit.observe_codebook(part, slope)
    return fit.quantizer((HEADS, DIM), scheme)


def keys_normalised(x, outliers):
    lower, upper = x.quantile(outliers / 2, dim=0), x.quantile(1 - outliers / 2, dim=0)
    scale, zero = (upper - lower) / 2, (upper + lower) / 2
    return (x - zero) / scale, scale.expand_as(x), (x >= lower) & (x <= upper)


def values_normalised(x, outliers):
    rows = x.flatten(1)
    count = outliers_per_tail(rows.shape[1], outliers)
    ordered = rows.sort(1).values
    lower, upper = ordered[:, count : count + 1], ordered[:, -1 - count].unsqueeze(1)
    scale, zero = (upper - lower) / 2, (upper + lower) / 2
    inside = ((rows >= lower) & (rows <= upper)).view_as(x)
    return ((rows - zero) / scale).view_as(x), scale.expand_as(rows).reshape(x.shape), inside


def objective(codebook, a, weight):
    return (weight * ((a[:, None] - codebook) ** 2).amin(1)).sum()


@pytest.mark.parametrize("outliers", [0.0, 0.02])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("weighting", ["fisher_scaled", "fisher", "none"])
def test_codebook_minimizes_the_weighted_error(data, side, weighting, outliers):
    x, gradient = data
    scheme = Scheme(
        Quantization(3, "nuq", strategy="channel" if side == "keys" else "token", weighting=weighting),
        outliers=Outliers(outliers),
    )
    quantizer = run(scheme, x, gradient)
    a, scale, inside = (keys_normalised if side == "keys" else values_normalised)(x, outliers)
    weight = {"fisher_scaled": gradient.square() * scale**2, "fisher": gradient.square(), "none": torch.ones_like(x)}[
        weighting
    ]
    a, weight = a[inside], weight[inside]
    ours = objective(quantizer.codebook, a, weight)
    for _ in range(30):  # no codebook near it is better by more than the resolution of the histogram
        other = quantizer.codebook + torch.randn(8) * 0.02
        assert ours <= objective(other.sort().values, a, weight) * 1.003
    lloyd = torch.linspace(-0.9, 0.9, 8)
    for _ in range(200):
        label = torch.bucketize(a, (lloyd[1:] + lloyd[:-1]) / 2)
        mass = torch.bincount(label, weight, minlength=8).clamp(min=1e-9)
        lloyd = torch.bincount(label, weight * a, minlength=8) / mass
    assert ours <= objective(lloyd, a, weight) * 1.005


def test_static_ranges_are_the_quantiles(data):
    x, gradient = data
    quantizer = run(Scheme(Quantization(4, "nuq", strategy="channel"), outliers=Outliers(0.02)), x, gradient)
    assert ((x < quantizer.lower).float().mean(0) - 0.01).abs().max() < 6 / TOKENS
    assert ((x > quantizer.upper).float().mean(0) - 0.01).abs().max() < 6 / TOKENS
    torch.testing.assert_close(quantizer.zero + quantizer.scale, quantizer.upper)
    dense = run(Scheme(Quantization(4, "int", strategy="channel")), x, gradient)
    torch.testing.assert_close(dense.zero - dense.scale, x.amin(0))


def test_thresholds_per_matrix(data):
    x, gradient = data
    keys = run(Scheme(Quantization(4, "nuq", strategy="channel"), outliers=Outliers(0.02, scope="matrix")), x, gradient)
    assert keys.lower.shape == (1, 1)
    assert ((x < keys.lower) | (x > keys.upper)).float().mean().item() == pytest.approx(0.02, abs=0.004)
    assert (keys.zero + keys.scale <= keys.upper + 1e-5).all()
    values = run(Scheme(Quantization(4, "nuq", strategy="token"), outliers=Outliers(0.02, scope="matrix")), x, gradient)
    encoded = values.encode(x.transpose(0, 1)[None])
    assert len(encoded.outlier_values) / x.numel() == pytest.approx(0.02, abs=0.004)


def test_qnorm_keeps_mean_and_deviation(data):
    x, gradient = data
    scheme = Scheme(Quantization(2, "nuq", strategy="channel", qnorm=True, weighting="none"), outliers=Outliers(0.02))
    quantizer = run(scheme, x, gradient)
    a, _, inside = keys_normalised(x, 0.02)
    a = a[inside]
    rounded = quantizer.codebook[torch.bucketize(a, quantizer.boundaries)]
    assert rounded.mean().item() == pytest.approx(a.mean().item(), abs=2e-3)
    assert rounded.std().item() == pytest.approx(a.std().item(), abs=2e-3)
    plain = run(Scheme(Quantization(2, "nuq", strategy="channel", weighting="none"), outliers=Outliers(0.02)), x, gradient)
    assert torch.equal(plain.boundaries, quantizer.boundaries)
    assert plain.codebook[torch.bucketize(a, plain.boundaries)].std() < a.std() - 0.01


def test_gradients_of_zero_fall_back_to_counting(data):
    x, _ = data
    weighted = run(Scheme(Quantization(3, "nuq")), x, torch.zeros_like(x))
    counted = run(Scheme(Quantization(3, "nuq", weighting="none")), x, torch.zeros_like(x))
    assert torch.equal(weighted.codebook, counted.codebook)


def test_a_constant_channel_is_fitted(data):
    x, gradient = data
    x[:, 0, 0] = 1.25
    quantizer = run(Scheme(Quantization(3, "nuq", strategy="channel"), outliers=Outliers(0.02)), x, gradient)
    found = quantizer.dequantize(quantizer.encode(x.transpose(0, 1)[None]))[0, 0, :, 0]
    torch.testing.assert_close(found, torch.full((TOKENS,), 1.25))


def test_smoothing_factors_are_those_of_pairs(data):
    """SmoothQuant, equation 4, of keys alone: proportional to max|K|^alpha of a pair; what is left of outlier channels."""
    x, gradient = data
    x[:, 1, 3] *= 100
    scheme = Scheme(Quantization(8, "int", strategy="token_head"), Transform(smooth_alpha=0.5))
    quantizer = run(scheme, x, gradient)
    pairs = torch.maximum(x.abs().amax(0)[:, : DIM // 2], x.abs().amax(0)[:, DIM // 2 :]).sqrt()
    expected = torch.cat([pairs, pairs], 1) / pairs.log().mean(1, keepdim=True).exp()
    torch.testing.assert_close(quantizer.smooth, expected)
    elements, plain = x.transpose(0, 1)[None], Quantizer(Scheme(Quantization(8, "int", strategy="token_head")))
    off, off_plain = ((q.dequantize(q.encode(elements)) - elements)[0, 1, :, :3].square().mean() for q in (quantizer, plain))
    assert off < 0.1 * off_plain
