"""The compiled encoder against its reference in plain torch: the same codes, ranges and outliers, to the bit."""

import copy

import pytest
import torch

from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme
from narrowkv.codec.cpu.encode import all_finite
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.saturation import Saturation
from narrowkv.errors import ActivationError

SHAPES = [(1, 1, 64, 80), (3, 2, 128, 16), (1, 8, 64, 128)]
SCHEMES = {
    "token": Scheme(Quantization(4, "int")),
    "token, 1%": Scheme(Quantization(3, "nf"), outliers=Outliers(0.01)),
    "head, 2%": Scheme(Quantization(2, "int", strategy="token_head"), outliers=Outliers(0.02)),
    "channels in groups": Scheme(Quantization(2, "int", strategy="token_head", group_size=8)),
    "channels in groups, 2%": Scheme(Quantization(4, "nf", strategy="token_head", group_size=16), outliers=Outliers(0.02)),
    "tokens in groups": Scheme(Quantization(2, "int", strategy="channel", group_size=32), outliers=Outliers(0.02)),
    "static": Scheme(Quantization(3, "int", strategy="channel")),
    "static, 1%": Scheme(Quantization(4, "nf", strategy="channel"), outliers=Outliers(0.01)),
}


def made(scheme, heads, dim):
    tables = {}
    if scheme.static:
        tables = {"scale": torch.rand(heads, dim), "zero": torch.randn(heads, dim)}
        tables["scale"][0, 0] = 0
        if scheme.outliers.fraction:
            tables |= {"lower": -2 - torch.rand(heads, dim), "upper": 2 + torch.rand(heads, dim)}
    return Quantizer(scheme, **tables)


def drawn(shape, dtype):
    """Elements of all sizes, with ties."""
    return (torch.randn(shape) * 10 ** torch.randint(-4, 3, (*shape[:2], 1, shape[3]))).to(dtype)


def require_same(found, expected):
    assert found.ranges.keys() == expected.ranges.keys()
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("skipped", [False, True])
def test_the_compiled_form_is_the_plain_one(name, shape, dtype, skipped):
    quantizer = made(SCHEMES[name], *shape[1::2])
    assert quantizer._encoder is not None
    for tokens in (shape[2], *((1, 63) if quantizer.scheme.tokens_per_group == 1 else (32,))):
        x = drawn(shape, dtype)[:, :, :tokens]
        skip = torch.rand(shape[0], tokens) < 0.3 if skipped else None
        require_same(quantizer.encode(x, skip), quantizer.encode_naive(x, skip))
        rotated = x.transpose(1, 2).contiguous().transpose(1, 2)  # as a model's projection leaves it
        require_same(quantizer.encode(rotated, skip), quantizer.encode_naive(x, skip))


@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, 6e-8, 65504.0])
def test_constant_elements_and_the_limits_of_float16(value):
    for scheme in SCHEMES.values():
        x, quantizer = torch.full((1, 2, 64, 32), value), made(scheme, 2, 32)
        for elements in (x, x * torch.tensor([1.0, -1.0]).repeat(16)):
            require_same(quantizer.encode(elements), quantizer.encode_naive(elements))


def test_whole_groups_that_are_skipped_have_an_empty_range():
    quantizer, x = made(SCHEMES["tokens in groups"], 2, 16), torch.randn(2, 2, 64, 16)
    skip = torch.zeros(2, 64, dtype=torch.bool)
    skip[0, :40] = True
    require_same(quantizer.encode(x, skip), quantizer.encode_naive(x, skip))
    assert (quantizer.encode(x, skip).ranges["scale"][0, :, 0] == 0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    x, before = torch.randn(2, 4, 256, 64), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for scheme in SCHEMES.values():
            quantizer = made(scheme, 4, 64)
            require_same(quantizer.encode(x), quantizer.encode_naive(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_written_one_by_one_equal_those_encoded_at_once(name):
    quantizer, x = made(SCHEMES[name], 3, 32), drawn((2, 3, 64, 32), torch.float32)
    expected = quantizer.encode_naive(x)
    buffer, step = EncodeBuffer(quantizer.scheme, 2, 3, 64, 32, like=x), quantizer.scheme.tokens_per_group
    for first in range(0, 64, step):
        buffer.outliers = quantizer.encode_into(buffer, first, x[:, :, first : first + step])
    found = buffer.encoded()
    if found.outlier_index is not None:
        found.outlier_index, order = found.outlier_index.sort()
        found.outlier_values = found.outlier_values[order]
    require_same(found, expected)


def test_an_outlier_buffer_that_is_too_small_grows():
    quantizer = made(SCHEMES["static, 1%"], 2, 16)
    x = torch.full((1, 2, 64, 16), 9.0)
    require_same(quantizer.encode(x), quantizer.encode_naive(x))
    assert len(quantizer.encode(x).outlier_index) == x.numel()


def test_what_does_not_fit_is_refused_and_nothing_is_counted():
    quantizer, x = made(SCHEMES["static, 1%"], 1, 16), torch.zeros(1, 1, 1, 16)
    buffer = EncodeBuffer(quantizer.scheme, 1, 1, 64, 16, like=x)
    with pytest.raises(ActivationError, match="Outliers exceed the range of float16"):
        quantizer.encode_into(buffer, 0, x + 1e6)
    assert buffer.outliers == 0
    with pytest.raises(ActivationError, match="Ranges exceed"):
        made(SCHEMES["token"], 1, 16).encode(torch.linspace(-1e6, 1e6, 16).view(1, 1, 1, 16))


def test_a_quantizer_that_has_encoded_can_be_copied_and_split():
    quantizer, x = made(SCHEMES["static, 1%"], 4, 16), torch.randn(1, 4, 5, 16)
    expected = quantizer.encode(x)
    require_same(copy.deepcopy(quantizer).encode(x), expected)
    part = quantizer.of_heads(1, 2)
    require_same(part.encode(x[:, 1:3]), part.encode_naive(x[:, 1:3]))


def test_what_would_be_written_outside_memory_is_refused():
    quantizer, x = made(SCHEMES["static, 1%"], 2, 16), torch.randn(3, 2, 5, 16)
    for elements, first in ((x[:1], 0), (x[:, :1], 0), (x[..., :8], 0), (x, 60), (x, -1)):
        buffer = EncodeBuffer(quantizer.scheme, 3, 2, 64, 16, like=x)
        with pytest.raises(ValueError, match="elements"):
            quantizer._encoder.write(buffer, first, elements, None)
    buffer.outliers = len(buffer.outlier_index) + 1
    with pytest.raises(ValueError, match="more outliers"):
        quantizer._encoder.write(buffer, 0, x, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)  # the last in torch
@pytest.mark.parametrize("shape", [(1, 1, 1, 80), (3, 2, 63, 16)], ids=str)
def test_one_element_that_is_not_finite_is_found(dtype, shape):
    x = torch.randn(shape, dtype=dtype) * torch.finfo(dtype).max / 10
    x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    assert all_finite(x, x[0], x[..., :0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0, 0, 0), tuple(size - 1 for size in shape)):
            broken = x.clone()
            broken[place] = bad
            for turned in (broken, *(broken.transpose(*pair).contiguous().transpose(*pair) for pair in ((1, 2), (2, 3)))):
                assert not all_finite(x, turned)
                assert not all_finite(turned, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # compiled, and not
def test_elements_far_out_of_a_learned_range_are_counted(dtype):
    quantizer, x = made(SCHEMES["static"], 2, 16), torch.randn(3, 2, 10, 16).to(dtype)
    skip = torch.rand(3, 10) < 0.3
    reach = quantizer.scale.clamp(min=float(quantizer.scale.mean()) / 100)
    expected = ((x.float() - quantizer.zero[:, None]).abs() > 3 * reach[:, None]) & ~skip[:, None, :, None]
    buffer = EncodeBuffer(quantizer.scheme, 3, 2, 64, 16, like=x)
    whole, pieces = Saturation(), Saturation()
    quantizer.encode(x, skip, whole)
    for start in (0, 5):
        quantizer.encode_into(buffer, start, x[:, :, start : start + 5], skip[:, start : start + 5], pieces)
    assert vars(whole) == vars(pieces) == {"out_of_range": int(expected.sum()), "seen": x.numel()}
    assert whole.out_of_range
    for exact in ("static, 1%", "token"):
        nothing = Saturation()
        made(SCHEMES[exact], 2, 16).encode(x, skip, nothing)
        assert nothing.seen == 0
