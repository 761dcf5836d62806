"""Gradients of quantized elements against what the definition says, written out in plain torch."""

import pytest
import torch
from tests.stream_cases import quantizer as trellis_quantizer

from narrowkv.attention import Rope
from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme, Transform
from narrowkv.codec.frames import FRAME, MIDDLE
from narrowkv.codec.straight_through import depends_on_outliers, passing, substitute
from narrowkv.codec.trellis import TrellisTables

SHAPE = (3, 2, 63, 80)


def gradient(quantizer, x, weights, outliers=None):
    """That of sum(weights * quantized) by x."""
    x = x.clone().requires_grad_()
    elements = quantizer.dequantize(quantizer.encode(x.detach()))
    found = substitute(passing(quantizer, x, outliers), elements)
    assert torch.equal(found, elements)
    (found * weights).sum().backward()
    return x.grad


@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 1, 16)])
def test_elements_beyond_a_static_range_have_no_gradient(shape):
    scale, zero = torch.rand(shape[1], shape[3]) + 0.5, torch.randn(shape[1], shape[3])
    of = Scheme(Quantization(3, "int", strategy="channel"))
    x, weights = 2 * torch.randn(shape), torch.randn(shape)
    inside = ((x - zero[:, None]) / scale[:, None]).abs() <= 1
    assert 0.2 < inside.float().mean() < 0.9
    found = gradient(Quantizer(of, scale=scale, zero=zero), x, weights)
    assert torch.equal(found, weights * inside)


def test_outliers_are_exact_so_their_gradient_is_too():
    scale, zero = torch.rand(2, 80) + 0.5, torch.randn(2, 80)
    of = Scheme(Quantization(3, "int", strategy="channel"), outliers=Outliers(0.01, cap=2))
    capped = Quantizer(of, scale=scale, zero=zero, lower=zero - scale, upper=zero + scale)
    x, weights = 2 * torch.randn(SHAPE), torch.randn(SHAPE)
    outliers = capped.encode(x).outlier_mask()
    assert depends_on_outliers(capped) and 0 < outliers.sum() <= 2 * 3 * 63
    inside = ((x - zero[:, None]) / scale[:, None]).abs() <= 1
    assert torch.equal(gradient(capped, x, weights, outliers), weights * (inside | outliers))


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(Quantization(2, "int"), Transform(pre_rope=True), Outliers(0.02)),
        Scheme(Quantization(4, "int", strategy="token_head"), Transform(hadamard=True)),
        Scheme(Quantization(4, "fp", strategy="token_head", group_size=16, scale_dtype="float8")),
    ],
    ids=Scheme.describe,
)
def test_ranges_taken_online_follow_their_elements(scheme):
    x, weights = torch.randn(SHAPE), torch.randn(SHAPE)
    assert not depends_on_outliers(Quantizer(scheme))
    assert torch.equal(gradient(Quantizer(scheme), x, weights), weights)


def decoding_matrices(quantizer):
    """What coefficients, one for each channel, are multiplied by: [kv_heads, offsets in a frame, head_dim, head_dim]."""
    heads, half = quantizer.pairs.shape[:2]
    found = torch.zeros(heads, FRAME, 2 * half, 2 * half, dtype=torch.float64)
    for offset in range(FRAME):
        for pair in range(half):
            matrix = quantizer.pairs[:, pair].double()
            where = torch.tensor([pair, pair + half])
            if quantizer.frequencies is not None:
                angle = (offset - MIDDLE) * quantizer.frequencies[pair].double()
                back = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
                matrix, where_from = matrix @ back, quantizer.channels.long()[where]
            else:
                where_from = where
            for i in range(2):
                for j in range(2):
                    found[:, offset, where[i], where_from[j]] = matrix[:, i, j]
    return found


@pytest.mark.parametrize("keys", [True, False])
def test_coefficients_of_pairs_pass_where_their_rate_reaches(keys):
    rope = Rope(10000.0 ** -(torch.arange(40) / 40)) if keys else None
    quantizer = trellis_quantizer(2, 80, keys=keys, rope=rope)
    x, weights = 3 * torch.randn(SHAPE) + quantizer.mean[:, None], torch.randn(SHAPE)
    whole = decoding_matrices(quantizer)
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    passed = 0.0
    for head in range(2):
        order = quantizer.order[head].long()
        for token in range(63):
            decode = whole[head, token % FRAME]
            encode, decode = torch.linalg.inv(decode)[:, order], decode[order]
            of_token = (x[:, head, token].double() - quantizer.mean[head].double()) @ encode
            normed = of_token / quantizer.norm_of(quantizer.coefficients(x)[1])[:, head, token]
            passes = reached(quantizer, normed)
            passed += passes.double().mean().item() / 126
            expected[:, head, token] = (weights[:, head, token].double() @ decode.T * passes) @ encode.T
    found = gradient(quantizer, x, weights)
    assert 0.5 < passed < 0.999
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def reached(quantizer, coefficients):
    """Which coefficients lie between the outermost entries of their rate."""
    entries = TrellisTables(quantizer.entries[0, :, 0], quantizer.entries[0, :, 1]).entries()
    ends = torch.stack([entries.amin(1), entries.amax(1)]) * quantizer.steps
    low, high = ends[:, quantizer.rates - 1].double()
    return (coefficients >= low) & (coefficients <= high)


def test_coefficients_of_a_whole_head_pass_where_their_rate_reaches():
    quantizer = trellis_quantizer(2, 80, keys=False, learned_rotation=True, outliers=0.02)
    x, weights = torch.randn(SHAPE) + quantizer.mean[:, None], torch.randn(SHAPE)
    x[0, 0, 5] += 40 * torch.randn(80)
    outliers = quantizer.encode(x).outlier_mask()
    coefficients, _ = quantizer.coefficients(x)
    decode = quantizer.matrix_steps.double()[..., None] * quantizer.matrix.double()
    passes = reached(quantizer, coefficients) | outliers
    assert depends_on_outliers(quantizer) and outliers.any() and (outliers & ~reached(quantizer, coefficients)).any()
    expected = (weights.double() @ decode.mT * passes) @ torch.linalg.pinv(decode).mT
    found = gradient(quantizer, x, weights, outliers)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
