"""The quantizer against the formulas, written again in a few plain lines."""

import dataclasses

import pytest
import torch

from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme, Transform
from narrowkv.codec.cuda import encode as cuda
from narrowkv.errors import ActivationError, RecipeError

SHAPES = [(1, 1, 63, 80), (3, 2, 64, 16), (2, 4, 1, 8)]


def static_tables(x, outliers):
    flat = x.transpose(1, 2).flatten(0, 1)  # [samples, heads, dim]
    lower, upper = flat.quantile(outliers / 2, dim=0), flat.quantile(1 - outliers / 2, dim=0)
    tables = {"scale": (upper - lower) / 2, "zero": (upper + lower) / 2}
    return tables | ({"lower": lower, "upper": upper} if outliers else {})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strategy", ["token", "token_head"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_rounding_per_token(shape, strategy, bits):
    x = torch.randn(shape)
    dims = (1, 3) if strategy == "token" else (3,)
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    step = (high - low) / (2**bits - 1)
    range_zero, half = ((high + low) / 2).half().float(), ((high - low) / 2).half().float()
    levels = torch.arange(2**bits) * 2 / (2**bits - 1) - 1
    expected = levels[((x - range_zero)[..., None] / half[..., None] - levels).abs().argmin(-1)] * half + range_zero
    quantizer = Quantizer(Scheme(Quantization(bits, "int", strategy=strategy)))
    found = quantizer.dequantize(quantizer.encode(x))
    torch.testing.assert_close(found, expected)
    assert ((found - x).abs() <= step / 2 + 2e-3 * x.abs().max()).all()


@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.02])
def test_static_keys_per_channel_with_outliers(outliers):
    x = torch.randn(1, 2, 400, 24) * torch.rand(2, 1, 24) * 5
    codebook = torch.tensor([-0.8, -0.3, 0.2, 0.9])
    quantizer = Quantizer(
        Scheme(Quantization(2, "nuq", strategy="channel"), outliers=Outliers(outliers)),
        codebook=codebook,
        **static_tables(x, outliers),
    )
    encoded = quantizer.encode(x)
    scale, zero = quantizer.scale[:, None], quantizer.zero[:, None]
    a = (x - zero) / scale
    expected = codebook[(a[..., None] - codebook).abs().argmin(-1)] * scale + zero
    outside = a.abs() > 1 + 1e-6 if outliers else torch.zeros_like(a, dtype=torch.bool)
    expected[outside] = x[outside].half().float()
    torch.testing.assert_close(quantizer.dequantize(encoded), expected)
    assert not encoded.ranges
    assert outside.float().mean() == pytest.approx(outliers, abs=0.006)
    if outliers:
        assert len(encoded.outlier_values) == outside.sum()


@pytest.mark.parametrize("strategy", ["token", "token_head"])
def test_online_outliers_are_the_extremes_of_each_vector(strategy):
    x = torch.randn(2, 4, 5, 64)
    quantizer = Quantizer(Scheme(Quantization(2, "int", strategy=strategy), outliers=Outliers(0.02)))
    encoded = quantizer.encode(x)
    vectors = x.transpose(1, 2).flatten(2) if strategy == "token" else x
    count = int(vectors.shape[-1] * 0.01 + 0.5)
    mask = torch.zeros_like(vectors, dtype=torch.bool)
    for largest in (True, False):
        mask.scatter_(-1, vectors.topk(count, largest=largest).indices, True)
    mask = mask.unflatten(2, (4, 64)).transpose(1, 2) if strategy == "token" else mask
    assert torch.equal(encoded.outlier_index, mask.flatten().nonzero().squeeze(1))
    assert torch.equal(quantizer.dequantize(encoded)[mask], x[mask].half().float())


def test_thresholds_per_matrix():
    x = torch.randn(1, 2, 50, 16)
    bounds = {"lower": torch.full((1, 1), -1.5), "upper": torch.full((1, 1), 1.5)}
    quantizer = Quantizer(Scheme(Quantization(4, "int"), outliers=Outliers(0.01, scope="matrix")), **bounds)
    found = quantizer.dequantize(quantizer.encode(x))
    assert torch.equal(found[x.abs() > 1.5], x[x.abs() > 1.5].half().float())
    assert (found - x).abs().max() < 3 / 15 / 2 + 1e-2


def test_cap_keeps_the_farthest_outliers_of_each_token():
    x = torch.zeros(1, 2, 3, 8)
    x[0, 0, 0, :4] = torch.tensor([3.0, 5.0, 2.0, 4.0])
    x[0, 1, 0, 2] = -9.0
    tables = {"scale": torch.ones(2, 8), "zero": torch.zeros(2, 8), "lower": -torch.ones(2, 8), "upper": torch.ones(2, 8)}
    quantizer = Quantizer(Scheme(Quantization(4, "int", strategy="channel"), outliers=Outliers(0.01, cap=2)), **tables)
    assert quantizer.encode(x).outlier_values.tolist() == [5.0, -9.0]


def test_skipped_tokens_spend_no_outliers():
    x = torch.randn(2, 2, 4, 64)
    quantizer = Quantizer(Scheme(Quantization(2, "int"), outliers=Outliers(0.02)))
    skip = torch.tensor([[True, False, False, False], [True, True, True, True]])
    where = torch.unravel_index(quantizer.encode(x, skip).outlier_index, x.shape)
    assert not skip[where[0], where[2]].any()
    assert len(where[0]) == 3 * 2


def test_qnorm_dequantizes_with_other_levels_than_it_quantizes():
    levels = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    plain = Quantizer(Scheme(Quantization(2, "nuq")), codebook=levels)
    moved = Quantizer(Scheme(Quantization(2, "nuq", qnorm=True)), codebook=levels * 1.1, boundaries=plain.boundaries)
    x = torch.randn(1, 1, 10, 32)
    assert torch.equal(plain.encode(x).codes, moved.encode(x).codes)


@pytest.mark.parametrize("strategy", ["token", "token_head"])
def test_constant_vectors_are_exact(strategy):
    for constant in (0.0, 2.5):
        x = torch.full((1, 2, 3, 16), constant)
        for scheme in (
            Scheme(Quantization(2, "int", strategy=strategy)),
            Scheme(Quantization(2, "nf", strategy=strategy), outliers=Outliers(0.02)),
        ):
            quantizer = Quantizer(scheme)
            assert torch.equal(quantizer.dequantize(quantizer.encode(x)), x)


def test_a_constant_channel_is_exact():
    tables = {"scale": torch.zeros(1, 8), "zero": torch.full((1, 8), 1.5)}
    quantizer = Quantizer(Scheme(Quantization(3, "int", strategy="channel")), **tables)
    x = torch.full((1, 1, 5, 8), 1.5)
    assert torch.equal(quantizer.dequantize(quantizer.encode(x)), x)


def test_elements_beyond_float16_are_refused():
    x = torch.randn(1, 1, 4, 8)
    x[0, 0, 2, 3] = 1e6
    with pytest.raises(ActivationError, match="float16"):
        Quantizer(Scheme(Quantization(4, "int"))).encode(x)


def test_a_scheme_without_its_tables_is_refused():
    with pytest.raises(RecipeError, match="calibrat"):
        Quantizer(Scheme(Quantization(3, "nuq")))
    with pytest.raises(RecipeError, match="scale"):
        Quantizer(Scheme(Quantization(3, "int", strategy="channel")))
    with pytest.raises(RecipeError, match="lower"):
        Quantizer(Scheme(Quantization(3, "int"), outliers=Outliers(0.01, scope="matrix")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outliers_keep_the_models_dtype_in_16_bits(dtype):
    x = torch.randn(1, 2, 4, 64, dtype=dtype)
    values = Quantizer(Scheme(Quantization(4, "int"), outliers=Outliers(0.02))).encode(x).outlier_values
    assert values.dtype == (dtype if dtype != torch.float32 else torch.float16)


@pytest.mark.parametrize("bits", [2, 4])
def test_groups_are_rounded_as_kivi_has_it(bits):
    """Liu et al., section 3: z = min, s = (max - min) / (2^b - 1), x = round((x - z) / s) s + z, group by group."""
    x, group = torch.randn(2, 3, 64, 16) * torch.rand(16) * 9, 8
    for strategy, dim in (("channel", 2), ("token_head", 3)):
        elements = x.unflatten(dim, (-1, group))
        zero, top = elements.amin(dim + 1, keepdim=True), elements.amax(dim + 1, keepdim=True)
        scale = (top - zero) / (2**bits - 1)
        expected = (((elements - zero) / scale).round() * scale + zero).flatten(dim, dim + 1)
        quantizer = Quantizer(Scheme(Quantization(bits, "int", strategy=strategy, group_size=group)))
        found = quantizer.dequantize(quantizer.encode(x))
        step = scale.expand_as(elements).flatten(dim, dim + 1)
        off = (found - expected).abs()
        assert (off < 0.02 * step).float().mean() > 0.995  # scale and zero have 16 bits, so a tie may fall to either side
        assert (off < 1.02 * step).all()


def test_a_group_of_tokens_has_the_range_of_those_that_count():
    x = torch.randn(1, 1, 32, 8)
    x[0, 0, :3] *= 1000
    skip = torch.zeros(1, 32, dtype=torch.bool)
    skip[0, :3] = True
    quantizer = Quantizer(Scheme(Quantization(4, "int", strategy="channel", group_size=16)))
    found = quantizer.dequantize(quantizer.encode(x, skip))
    assert (found - x)[0, 0, 3:].abs().max() < 0.3
    assert torch.isfinite(quantizer.dequantize(quantizer.encode(x, torch.ones_like(skip)))).all()


def nearest_e2m1(x):
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return levels[(x.abs()[..., None] - levels).abs().argmin(-1)] * x.sign()


@pytest.mark.parametrize("shape", [(1, 1, 63, 80), (3, 2, 64, 16), (2, 4, 1, 48)], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_nvfp4_has_scales_of_8_bits_below_one_for_each_token(shape, size):
    """arXiv 2509.25149, with a token in place of the tensor; and with no number too large or too small."""
    x = size * torch.randn(shape) * torch.rand(shape[-1])
    blocks = x.unflatten(3, (-1, 16))
    outer = x.abs().amax((1, 3), keepdim=True)[..., None] / (6 * 448)
    outer = (6 * outer).bfloat16().float() / 6  # held for levels up to 1, not up to 6
    inner = (blocks.abs().amax(4, keepdim=True) / 6 / outer).to(torch.float8_e4m3fn).float()
    expected = (nearest_e2m1(blocks / (inner * outer)) * inner * outer).flatten(3)
    quantizer = Quantizer(Scheme(Quantization(4, "fp", strategy="token_head", group_size=16, scale_dtype="float8")))
    encoded = quantizer.encode(x)
    assert encoded.ranges["scale"].dtype == torch.float8_e4m3fn and encoded.ranges["token_scale"].dtype == torch.bfloat16
    off = (quantizer.dequantize(encoded) - expected).abs() / (inner * outer).expand_as(blocks).flatten(3)
    assert (off < 1e-4).float().mean() > 0.999  # a tie may fall to either side
    assert off.max() < 2.01


def test_nvfp4_of_nothing_is_nothing():
    x = torch.zeros(1, 2, 3, 32)
    x[0, 1, 2, 16:] = torch.randn(16)
    quantizer = Quantizer(Scheme(Quantization(4, "fp", strategy="token_head", group_size=16, scale_dtype="float8")))
    assert (quantizer.dequantize(quantizer.encode(x))[x == 0] == 0).all()


def test_smoothed_elements_are_divided_rounded_and_multiplied():
    x, factor = torch.randn(2, 3, 9, 56) * torch.rand(3, 1, 56) * 20, torch.rand(3, 56) * 4 + 0.1
    plain = Quantizer(Scheme(Quantization(8, "int", strategy="token_head")))
    smooth = Quantizer(Scheme(Quantization(8, "int", strategy="token_head"), Transform(smooth_alpha=0.5)), smooth=factor)
    expected = plain.dequantize(plain.encode(x / factor[:, None])) * factor[:, None]
    assert torch.equal(smooth.dequantize(smooth.encode(x)), expected)
    with pytest.raises(RecipeError, match="smooth"):
        Quantizer(Scheme(Quantization(8, "int"), Transform(smooth_alpha=0.5)))


@pytest.mark.parametrize("part", ["quantization", "transform", "outliers"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_encoder_takes_no_scheme_with_a_field_that_it_does_not_know(device, part, monkeypatch):
    monkeypatch.setattr(cuda, "runs_on", lambda where: device == "cuda")
    plain = Scheme(Quantization(4, "int"))
    today = getattr(plain, part)
    tomorrow = dataclasses.make_dataclass("Tomorrow", [("clipped", float, 0.0)], bases=(type(today),), frozen=True)
    known, unknown = (
        Quantizer(dataclasses.replace(plain, **{part: tomorrow(**dataclasses.asdict(today), clipped=clipped)}))
        for clipped in (0.0, 0.5)
    )
    where = torch.device(device)
    assert not known.encodes_in_torch(where) and unknown.encodes_in_torch(where)
