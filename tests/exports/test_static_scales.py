"""Static scales: what fits into them, how far off it is, and what they take."""

import pytest
import torch

from narrowkv.errors import RecipeError
from narrowkv.exports import StaticQuantization

SHAPES = ((3, 1, 63, 80), (1, 2, 5, 16))
BOTH = [(datatype, strategy) for datatype in ("int8", "int4", "fp8") for strategy in ("tensor", "head", "channel")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("datatype", "strategy"), BOTH)
def test_elements_within_a_range_are_off_by_half_a_step(datatype, strategy, shape):
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[3])
    quantization = StaticQuantization(datatype, strategy)
    scale = quantization.scales(x.abs().amax((0, 2)))
    assert scale.shape == {"tensor": (1, 1), "head": (shape[1], 1), "channel": (shape[1], shape[3])}[strategy]
    error = (quantization.rounded(x, scale) - x).abs()
    # e4m3 has three bits after the first, and steps of 2^-9 at the least
    step = scale[:, None] if datatype != "fp8" else torch.maximum(x.abs() / 8, scale[:, None] * 2**-9)
    assert (error <= step / 2 * (1 + 1e-4)).all() and error.max() > 0


def test_elements_beyond_a_range_become_its_end():
    largest = torch.full((1, 2), 3.0)
    x = torch.tensor([-100.0, 100.0])[None, None, None]
    for datatype, expected in (("int8", (-128, 127)), ("int4", (-8, 7)), ("fp8", (-448, 448))):
        quantization = StaticQuantization(datatype, "tensor")
        scale = quantization.scales(largest)
        assert torch.allclose(quantization.rounded(x, scale), torch.tensor(expected) * scale)


def test_channels_of_zeros_have_scales_that_engines_take():
    for datatype, strategy in BOTH:
        quantization = StaticQuantization(datatype, strategy)
        scale = quantization.scales(torch.zeros(2, 8))
        assert (scale > 0).all() and scale.isfinite().all()
        assert not quantization.rounded(torch.zeros(1, 2, 3, 8), scale).any()


def test_bits_count_the_scales():
    assert StaticQuantization("int4", "channel").bits_per_element(2, 16, 8) == 4 + 32 / 8
    assert StaticQuantization("int8", "head").bits_per_element(2, 16, 8) == 8 + 32 / (16 * 8)
    assert StaticQuantization("fp8", "tensor").bits_per_element(2, 16, 8) == 8 + 32 / (2 * 16 * 8)


def test_names_are_checked():
    for names in (("int3", "tensor"), ("int4", "token")):
        with pytest.raises(RecipeError, match="choose one of"):
            StaticQuantization(*names)
