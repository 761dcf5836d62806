import pytest
import torch
from tests.stream_cases import decode

from narrowkv.codec.gaussian_tables import SQUARED_ERRORS, STEPS, gaussian_tables
from narrowkv.codec.trellis import encode

LLOYD_MAX = (0.3634, 0.1175, 0.03454, 0.009497, 0.002499)  # squared errors of the best scalar codebooks: Max 1960


@pytest.mark.parametrize("rate", range(1, 7))
def test_squared_errors_are_those_of_a_unit_gaussian(rate):
    counts, step = [8 * (rate == k) for k in range(7)], STEPS[rate - 1]
    x = torch.randn(1, 1000, 64, generator=torch.Generator().manual_seed(rate), dtype=torch.float64)
    elements = (x / step * 512).round().clamp(-32768, 32767).to(torch.int16)
    weights = torch.full((1, 1, 64), 65535).to(torch.uint16)
    decoded = decode(encode(elements, weights, counts, gaussian_tables()), counts, gaussian_tables()) * step
    error = (decoded - x)[..., 8:].square().mean().item()  # the first elements see only some of the states
    assert error == pytest.approx(SQUARED_ERRORS[rate - 1], rel=0.06)  # tails weigh much


def test_streams_beat_scalar_codebooks_and_stay_above_the_rate_distortion_bound():
    assert all(error < scalar for error, scalar in zip(SQUARED_ERRORS, LLOYD_MAX, strict=False))
    assert all(4.0**-rate < error for rate, error in enumerate(SQUARED_ERRORS, start=1))
