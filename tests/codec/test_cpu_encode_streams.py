"""Streams encoded in one compiled call against plain torch: the same codes and outliers, to the bit."""

import copy
from dataclasses import asdict, make_dataclass, replace

import pytest
import torch
from tests.codec.test_trellis_quantizer import drawn_elements, made

from narrowkv.codec import trellis
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.saturation import Saturation
from narrowkv.errors import ActivationError

SETTINGS = [{"learned_rotation": False}, {"learned_rotation": True}, {"learned_rotation": False, "pre_rope": True}]
SHAPES = [(1, 1, 63, 80), (3, 2, 130, 16), (2, 4, 1, 80), (1, 3, 2, 80), (2, 1, 3, 16), (1, 8, 1, 16)]


def drawn(shape, outliers, dtype=torch.float32, **settings):
    """A quantizer, a few of whose coefficients cost more than its threshold, and elements for it."""
    found = made(shape, outliers=outliers, **settings)
    x = drawn_elements(found, shape)[1].to(dtype)
    if outliers:
        cost = found.cost(x.float()).flatten()
        found = replace(found, outlier_threshold=cost.kthvalue(int(0.97 * cost.numel())).values[None])
    return found, x


def require_same(found, expected):
    assert torch.equal(found.codes, expected.codes)
    if expected.outlier_index is None:
        assert found.outlier_index is None
        return
    assert torch.equal(found.outlier_index, expected.outlier_index)
    assert found.outlier_values.dtype == expected.outlier_values.dtype
    assert torch.equal(found.outlier_values, expected.outlier_values)


def encoded_by(kernel, quantizer, x, skip=None, saturation=None):
    batch, heads, tokens, dim = x.shape
    buffer = EncodeBuffer(quantizer.scheme, batch, heads, tokens, dim, like=x)
    buffer.codes.fill_(255)
    buffer.outliers = quantizer.encoder.write(buffer, 0, x, skip, saturation, kernel)
    return buffer.encoded()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outliers", [0.0, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_compiled_form_is_the_plain_one(settings, shape, outliers, dtype):
    quantizer, x = drawn(shape, outliers, dtype, **settings)
    skip = torch.rand(shape[0], shape[2]) < 0.3
    rotated = x.transpose(1, 2).contiguous().transpose(1, 2)  # as a model's projection leaves it
    for kernel in trellis.KERNELS:
        require_same(encoded_by(kernel, quantizer, x), quantizer.encode_naive(x))
        require_same(encoded_by(kernel, quantizer, rotated, skip), quantizer.encode_naive(x, skip))
    require_same(quantizer.encode(x, skip), quantizer.encode_naive(x, skip))


@pytest.mark.parametrize("kernel", trellis.KERNELS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_chunks_of_a_tail_equal_plain_torch(kernel, settings):
    quantizer, x = drawn((2, 3, 60, 80), 0.01, **settings)
    x[:, :, 10:40] *= 20  # more outliers than places
    buffers = [EncodeBuffer(quantizer.scheme, 2, 3, 64, 80, like=x) for _ in range(2)]
    first, counted = 0, (Saturation(), Saturation())
    for count in (1, 12, 1, 6, 40):
        piece = x[:, :, first : first + count]
        buffers[0].outliers = quantizer.encoder.write(buffers[0], first, piece, None, counted[0], kernel)
        buffers[1].outliers = quantizer.encode_naive_into(buffers[1], first, piece, None, counted[1])
        first += count
    assert buffers[0].outliers > 0
    assert vars(counted[0]) == vars(counted[1])
    assert (counted[0].out_of_range > 0) == (not settings["learned_rotation"])  # norms follow elements
    require_same(buffers[0].encoded(), buffers[1].encoded())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outliers", [0.0, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_compiled_form_counts_what_is_out_of_range_as_the_plain_one(settings, shape, outliers, dtype):
    quantizer, x = drawn(shape, outliers, dtype, **settings)
    if quantizer.pairs is not None:  # no coefficient beyond 16 bits
        quantizer = replace(quantizer, pairs=(2 * torch.eye(2) + torch.rand(quantizer.pairs.shape)).half())
    mean, (batch, heads, tokens, dim) = quantizer.mean[None, :, None].float(), shape
    around = torch.full((batch, heads, tokens + 2, dim), 3e4).to(dtype)  # would count
    around[:, :, 1:-1] = (
        (mean + (3000 if settings["learned_rotation"] else 15) * (x.float() - mean)).clamp(-3e4, 3e4).to(dtype)
    )
    elements = around[:, :, 1:-1]
    for skip in (None, torch.rand(batch, tokens) < 0.3, torch.ones(batch, tokens, dtype=torch.bool)):
        expected = Saturation()
        quantizer.encode_naive(elements, skip, expected)
        assert expected.seen == batch * heads * tokens * quantizer.scheme.outlier_positions(dim)
        if skip is None or skip.all():
            assert (expected.out_of_range > 0) == (skip is None)
        for kernel in trellis.KERNELS:
            counted = Saturation()
            encoded_by(kernel, quantizer, elements, skip, counted)
            assert vars(counted) == vars(expected)


@pytest.mark.parametrize("kernel", trellis.KERNELS)
def test_zeros_and_huge_elements(kernel):
    for settings in SETTINGS:
        quantizer, x = drawn((1, 2, 5, 16), 0.02, **settings)
        for elements in (torch.zeros_like(x), x * 100, quantizer.mean[None, :, None].float().expand_as(x)):
            require_same(encoded_by(kernel, quantizer, elements), quantizer.encode_naive(elements))


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for settings in SETTINGS:
            quantizer, x = drawn((2, 2, 200, 80), 0.02, **settings)
            counted, expected = Saturation(), Saturation()
            x[:, :, ::3] *= 20
            require_same(quantizer.encode(x, None, counted), quantizer.encode_naive(x, None, expected))
            assert vars(counted) == vars(expected)
    finally:
        torch.set_num_threads(before)


def test_an_outlier_buffer_that_is_too_small_grows():
    quantizer, x = drawn((1, 2, 64, 80), 0.02, learned_rotation=False)
    quantizer = replace(quantizer, outlier_threshold=torch.zeros(1))
    buffer = EncodeBuffer(quantizer.scheme, 1, 2, 64, 80, like=x)
    buffer.outlier_index, buffer.outlier_values = buffer.outlier_index[:3], buffer.outlier_values[:3]
    counted, expected = Saturation(), Saturation()
    buffer.outliers = quantizer.encode_into(buffer, 0, 20 * x, None, counted)
    require_same(buffer.encoded(), quantizer.encode_naive(20 * x, None, expected))
    assert buffer.outliers > 3
    assert vars(counted) == vars(expected) and counted.out_of_range  # once, although encoded twice


def test_an_outlier_that_does_not_fit_is_refused_and_none_is_counted():
    quantizer, x = drawn((1, 2, 1, 16), 0.02, learned_rotation=False)
    buffer = EncodeBuffer(quantizer.scheme, 1, 2, 64, 16, like=x)
    counted = Saturation()
    with pytest.raises(ActivationError, match="Outliers exceed the range of float16"):
        quantizer.encode_into(buffer, 0, x + 1e8, None, counted)
    assert buffer.outliers == counted.seen == 0


def test_a_quantizer_that_has_encoded_can_be_copied_and_split():
    quantizer, x = drawn((1, 4, 5, 16), 0.02, learned_rotation=True)
    expected = quantizer.encode(x)
    require_same(copy.deepcopy(quantizer).encode(x), expected)
    part = quantizer.of_heads(1, 2)
    require_same(part.encode(x[:, 1:3]), part.encode_naive(x[:, 1:3]))


def test_arguments_that_lead_outside_of_memory_are_refused():
    quantizer, x = drawn((1, 2, 3, 16), 0.02, learned_rotation=False)
    for elements, first in ((x[:, :1], 0), (x[..., :8], 0), (x.expand(2, -1, -1, -1), 0), (x, 62), (x, -1)):
        buffer = EncodeBuffer(quantizer.scheme, 1, elements.shape[1], 64, 16, like=x)
        with pytest.raises(ValueError, match="elements"):
            quantizer.encoder.write(buffer, first, elements, None)
    buffer = EncodeBuffer(quantizer.scheme, 1, 2, 64, 16, like=x)
    buffer.outliers = quantizer.encode_into(buffer, 0, x * 100)
    buffer.outlier_index[0] = 2**40
    with pytest.raises(ValueError, match="outside the buffer"):
        quantizer.encoder.write(buffer, 3, x, None)


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("order", lambda table: table + 16),
        ("order", lambda table: table[:, 1:]),
        ("weight", lambda table: table[1:]),
        ("mean", lambda table: table[:, :8]),
        ("channels", lambda table: table + 16),
    ],
)
def test_tables_that_do_not_fit_are_refused(name, spoilt):
    quantizer, _ = drawn((1, 2, 3, 16), 0.02, learned_rotation=False, pre_rope=True)
    object.__setattr__(quantizer, name, spoilt(getattr(quantizer, name)))
    for cached in ("encoder", "frames", "search_weight"):
        quantizer.__dict__.pop(cached, None)
    with pytest.raises((ValueError, RuntimeError)):
        quantizer.encoder  # noqa: B018


@pytest.mark.parametrize("part", ["quantization", "transform", "outliers"])
def test_the_encoder_takes_no_scheme_with_a_field_that_it_does_not_know(part):
    quantizer, x = drawn((1, 2, 3, 16), 0.0, learned_rotation=True)
    today = getattr(quantizer.scheme, part)
    tomorrow = make_dataclass("Tomorrow", [("clipped", float, 0.0)], bases=(type(today),), frozen=True)
    known, unknown = (
        replace(quantizer, scheme=replace(quantizer.scheme, **{part: tomorrow(**asdict(today), clipped=clipped)}))
        for clipped in (0.0, 0.5)
    )
    assert not known.encodes_in_torch(x.device) and unknown.encodes_in_torch(x.device)
    assert known.encoder is not None and unknown.encoder is None
    require_same(unknown.encode(x), quantizer.encode_naive(x))
    buffer = EncodeBuffer(quantizer.scheme, *x.shape, like=x)
    unknown.encode_into(buffer, 0, x)
    require_same(buffer.encoded(), quantizer.encode_naive(x))
