"""Kernels that encode on a GPU, interpreted, against plain torch: the same codes, ranges and outliers to the bit."""

import pytest
import torch
from tests.cases import KEYS, made
from tests.conftest import KERNEL_DEVICE

from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme
from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.encode_buffer import EncodeBuffer

pytestmark = pytest.mark.skipif(cuda.kernels() is None, reason="needs Triton (`pip install triton`)")
SCHEMES = {
    "keys, fixed": KEYS["nuq4-1%"],
    "keys, fixed, 2 bits": KEYS["nuq2"],
    "values by token": Scheme(Quantization(3, "nuq", strategy="token"), outliers=Outliers(0.02)),
    "values by token, none outside": Scheme(Quantization(2, "int", strategy="token")),
    "values by token and head": Scheme(Quantization(4, "nf", strategy="token_head"), outliers=Outliers(0.02)),
}

GROUPED = {
    "tokens of a channel": Scheme(Quantization(2, "int", strategy="channel", group_size=32)),
    "tokens of a channel, few": Scheme(Quantization(4, "nf", strategy="channel", group_size=8), outliers=Outliers(0.02)),
    "channels of a token": Scheme(Quantization(4, "int", strategy="token_head", group_size=8)),
    "channels of a token, 20": Scheme(Quantization(3, "int", strategy="token_head", group_size=20)),
}


@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_tokens_are_encoded_as_in_plain_torch(scheme, skipping, monkeypatch):
    monkeypatch.setattr(cuda, "ELEMENTS", 80)  # two of three heads in a program
    quantizer = made(scheme, 3, 40).to(KERNEL_DEVICE)
    x = torch.randn(2, 3, 5, 40).half().transpose(1, 2).contiguous().transpose(1, 2).to(KERNEL_DEVICE)
    skip = (torch.rand(2, 5) < 0.4).to(KERNEL_DEVICE) if skipping else None
    expected = quantizer.encode_naive(x, skip)
    buffer = EncodeBuffer(scheme, 2, 3, 64, 40, like=x)
    held = quantizer._cuda_encoder.write(buffer, 7, x, skip)
    assert torch.equal(buffer.codes[:, :, 7:12], expected.codes)
    for name, part in expected.ranges.items():
        assert torch.equal(buffer.ranges[name][:, :, 7:12], part)
    buffer.outliers = held
    if scheme.outliers.fraction:
        row, head, token, code = torch.unravel_index(expected.outlier_index, expected.codes.shape)
        index = ((row * 3 + head) * 64 + token + 7) * 40 + code
        found, order = buffer.outlier_index[:held].sort()
        assert torch.equal(found, index)
        assert torch.equal(buffer.outlier_values[:held][order], expected.outlier_values)


def test_an_outlier_buffer_that_is_full_is_enlarged():
    scheme = SCHEMES["values by token"]
    quantizer = made(scheme, 3, 40).to(KERNEL_DEVICE)
    x = torch.randn(2, 3, 2, 40, device=KERNEL_DEVICE).half()
    buffer = EncodeBuffer(scheme, 2, 3, 64, 40, like=x)
    buffer.outlier_index, buffer.outlier_values = buffer.outlier_index[:3], buffer.outlier_values[:3]
    assert quantizer._cuda_encoder.write(buffer, 0, x, None) == len(quantizer.encode_naive(x).outlier_index) > 3


def test_elements_that_overflow_16_bits_are_not_written():
    quantizer = made(SCHEMES["values by token, none outside"], 1, 16).to(KERNEL_DEVICE)
    x = torch.randn(1, 1, 2, 16, device=KERNEL_DEVICE)
    x[0, 0, 1, 3] = 1e6
    buffer = EncodeBuffer(quantizer.scheme, 1, 1, 64, 16, like=x)
    assert quantizer._cuda_encoder.write(buffer, 0, x, None) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_equal_elements_become_outliers_one_by_one(dtype):
    scheme = Scheme(Quantization(2, "int", strategy="token"), outliers=Outliers(0.02))
    x = (torch.randint(-4, 4, (1, 2, 6, 80), device=KERNEL_DEVICE) / 7).to(dtype)
    x[..., 0] *= -0.0
    x[0, :, 1, :8] = 3e-6
    x[0, :, 2] = -2.5
    expected = Quantizer(scheme).to(KERNEL_DEVICE).encode_naive(x)
    buffer = EncodeBuffer(scheme, 1, 2, 6, 80, like=x)
    buffer.outliers = Quantizer(scheme).to(KERNEL_DEVICE)._cuda_encoder.write(buffer, 0, x, None)
    assert torch.equal(buffer.encoded().outlier_index.sort().values, expected.outlier_index)
    for ours, theirs in zip(buffer.encoded().tensors()[:3], expected.tensors()[:3], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize("scheme", GROUPED.values(), ids=GROUPED)
def test_groups_are_encoded_as_in_plain_torch(scheme, skipping):
    quantizer = made(scheme, 3, 40).to(KERNEL_DEVICE)
    tokens = 64 if scheme.strategy == "channel" else 6
    x = torch.randn(2, 3, tokens, 40).half().transpose(1, 2).contiguous().transpose(1, 2).to(KERNEL_DEVICE)
    skip = torch.rand(2, tokens, device=KERNEL_DEVICE) < 0.4 if skipping else None
    if skip is not None:
        skip[1, tokens // 2 :] = True
    expected = quantizer.encode_naive(x, skip)
    buffer = EncodeBuffer(scheme, 2, 3, 2 * tokens, 40, like=x)
    assert quantizer._group_encoder.write(buffer, tokens, x, skip) == 0
    assert torch.equal(buffer.codes[:, :, tokens:], expected.codes)
    for name, part in expected.ranges.items():
        assert torch.equal(buffer.ranges[name].chunk(2, dim=2)[1], part)


@pytest.mark.parametrize("scheme", GROUPED.values(), ids=GROUPED)
def test_a_range_of_a_group_that_overflows_float16_raises(scheme):
    x = torch.randn(1, 1, 32, 40, device=KERNEL_DEVICE)
    x[0, 0, 7, 3] = 1e6
    buffer = EncodeBuffer(scheme, 1, 1, 64, 40, like=x)
    assert Quantizer(scheme).to(KERNEL_DEVICE)._group_encoder.write(buffer, 0, x, None) is None
