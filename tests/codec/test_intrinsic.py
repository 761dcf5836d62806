import numpy as np
import pytest

from narrowkv.codec.intrinsic import IntrinsicValues, dequantize, quantize
from narrowkv.errors import ActivationError, RecipeError

EXAMPLE = np.array([0.1, 0.5, 1.2, 2.5, 3.8, 4.2, 5.1, 5.9])
VALUES = {"v1": 1.0, "v2": 4.0, "v_min": 0.0, "v_max": 6.0}


def test_the_worked_example():
    codes = quantize(EXAMPLE, **VALUES)
    assert codes.dtype == np.uint8 and codes.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert dequantize(codes, **VALUES).tolist() == [0, 0, 1, 1, 1, 4, 4, 4]
    assert np.abs(dequantize(codes, **VALUES) - EXAMPLE).mean() == pytest.approx(1.0375)


def test_the_nearest_level_is_better_and_uses_the_last_code():
    codes = quantize(EXAMPLE, **VALUES, nearest=True)
    assert dequantize(codes, **VALUES).tolist() == [0, 0, 1, 1, 4, 4, 6, 6]
    assert np.abs(dequantize(codes, **VALUES) - EXAMPLE).mean() == pytest.approx(0.4625)


def test_the_code_table_at_its_borders():
    assert quantize([0.999, 1.0, 3.999, 4.0, 6.0, 6.001], **VALUES).tolist() == [0, 1, 1, 2, 2, 3]
    assert quantize(np.zeros((2, 3)), **VALUES).shape == (2, 3)


def test_levels_are_estimated_from_the_block():
    elements = np.concatenate([np.full(500, 1.0), np.full(400, 4.0), np.linspace(0, 6, 100)])
    found = IntrinsicValues.of(elements)
    assert (found.v_min, found.v_max) == (0, 6)
    assert found.v1 == pytest.approx(1, abs=0.1) and found.v2 == pytest.approx(4, abs=0.1)
    preset = IntrinsicValues.of(elements, v_min=-1, v_max=9)
    assert (preset.v_min, preset.v_max) == (-1, 9)


def test_two_means_are_the_best_of_all_splits():
    elements = np.sort(np.random.default_rng(0).normal(size=60) ** 3)
    found = IntrinsicValues.of(elements, how="kmeans")
    errors = {i: elements[:i].var() * i + elements[i:].var() * (60 - i) for i in range(1, 60)}
    best = min(errors, key=errors.get)
    assert (found.v1, found.v2) == pytest.approx((elements[:best].mean(), elements[best:].mean()))


def test_constant_blocks_and_invalid_levels():
    flat = IntrinsicValues.of([2.5, 2.5])
    assert dequantize(quantize([2.5, 2.5], **vars(flat), nearest=True), **vars(flat)).tolist() == [2.5, 2.5]
    with pytest.raises(RecipeError, match="must ascend"):
        quantize([1.0], v1=4, v2=1, v_min=0, v_max=6)
    for bad in ([], [np.nan], [np.inf]):
        with pytest.raises(ActivationError):
            IntrinsicValues.of(bad)
