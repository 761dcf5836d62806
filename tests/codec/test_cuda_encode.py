"""Kernels that encode on a GPU, interpreted, against plain torch: the same codes, ranges and outliers to the bit."""

import pytest
import torch
from tests.attention.test_cpu import KEYS, made

from narrowkv.codec import Scheme, cuda, points
from narrowkv.codec.room import Room

pytestmark = pytest.mark.skipif(cuda.kernels() is None, reason="needs Triton (`pip install triton`)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEMES = {
    "keys, fixed": KEYS["nuq4-1%"],
    "keys, fixed, 2 bits": KEYS["nuq2"],
    "values by token": Scheme(3, "nuq", axis="token", outliers=0.02),
    "values by token, none outside": Scheme(2, "int", axis="token"),
    "values by token and head": Scheme(4, "nf", axis="token_head", outliers=0.02),
}


@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_tokens_are_encoded_as_in_plain_torch(scheme, skipping):
    quantizer = made(scheme, 3, 40).to(DEVICE)
    x = torch.randn(2, 3, 5, 40).half().transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE)
    skip = (torch.rand(2, 5) < 0.4).to(DEVICE) if skipping else None
    expected = quantizer.encode_naive(x, skip)
    room = Room(scheme, 2, 3, 64, 40, like=x)
    held = quantizer._cuda_encoder.write(room, 7, x, skip)
    assert torch.equal(room.codes[:, :, 7:12], expected.codes)
    for name, part in expected.ranges.items():
        assert torch.equal(room.ranges[name][:, :, 7:12], part)
    room.outliers = held
    if scheme.outliers:
        row, head, token, code = torch.unravel_index(expected.outlier_index, expected.codes.shape)
        index = ((row * 3 + head) * 64 + token + 7) * 40 + code
        found, order = room.outlier_index[:held].sort()
        assert torch.equal(found, index)
        assert torch.equal(room.outlier_values[:held][order], expected.outlier_values)


def test_outliers_that_find_no_room_are_made_room_for():
    scheme = SCHEMES["values by token"]
    quantizer = made(scheme, 3, 40).to(DEVICE)
    x = torch.randn(2, 3, 6, 40, device=DEVICE)
    room = Room(scheme, 2, 3, 64, 40, like=x)
    room.outlier_index, room.outlier_values = room.outlier_index[:3], room.outlier_values[:3]
    assert quantizer._cuda_encoder.write(room, 0, x, None) == len(quantizer.encode_naive(x).outlier_index) > 3


def test_what_does_not_fit_16_bits_is_told():
    quantizer = made(SCHEMES["values by token, none outside"], 1, 16).to(DEVICE)
    x = torch.randn(1, 1, 2, 16, device=DEVICE)
    x[0, 0, 1, 3] = 1e6
    room = Room(quantizer.scheme, 1, 1, 64, 16, like=x)
    assert quantizer._cuda_encoder.write(room, 0, x, None) is None


@pytest.mark.parametrize("shape", [(3, 20, 16, 2), (1, 80, 8, 1), (2, 12, 32, 2)])
def test_the_nearest_points_are_those_that_plain_torch_finds(shape):
    table = torch.randn(shape, device=DEVICE)
    numbers = torch.randn(2, shape[0], 3, shape[1] * shape[3], device=DEVICE)
    codes, cost = cuda.search(numbers, table)
    expected, distance = points.nearest_naive(numbers, table)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(cost, distance)
