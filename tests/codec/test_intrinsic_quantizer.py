"""Levels of blocks against the NumPy codec, block by block."""

import numpy as np
import pytest
import torch

from narrowkv.codec import IntrinsicValueQuantizer, Quantization, Scheme
from narrowkv.codec.intrinsic import IntrinsicValues, dequantize, quantize
from narrowkv.errors import ActivationError


def scheme(datatype="iv", round_down=False, group_size=64, lookahead_blocks=1):
    return Scheme(
        Quantization(
            2, datatype, strategy="block", group_size=group_size, round_down=round_down, lookahead_blocks=lookahead_blocks
        )
    )


@pytest.mark.parametrize("shape", [(1, 1, 64, 80), (3, 2, 128, 16), (2, 3, 192, 7)], ids=str)
@pytest.mark.parametrize("round_down", [True, False], ids=["round_down", "nearest"])
@pytest.mark.parametrize("datatype", ["iv", "iv-kmeans"])
def test_each_head_of_a_block_is_coded_as_the_numpy_codec_does(shape, round_down, datatype):
    x, quantizer = torch.randn(shape) ** 3 + torch.randn(shape[1], 1, 1), IntrinsicValueQuantizer(scheme(datatype, round_down))
    encoded = quantizer.encode(x)
    assert encoded.ranges["levels"].shape == (*shape[:2], shape[2] // 64, 4)
    for place in np.ndindex(*shape[:2], shape[2] // 64):
        row, head, block = place
        elements = x[row, head, 64 * block : 64 * block + 64]
        found = IntrinsicValues.of(elements, how="kmeans" if datatype == "iv-kmeans" else "frequency")
        np.testing.assert_allclose(encoded.ranges["levels"][place].numpy(), found.levels, rtol=1e-3, atol=1e-3)
        held = dict(zip(("v_min", "v1", "v2", "v_max"), encoded.ranges["levels"][place].tolist(), strict=True))
        expected = dequantize(quantize(elements, **held, nearest=not round_down), **held)
        dequantized = quantizer.dequantize(encoded)[row, head, 64 * block : 64 * block + 64]
        np.testing.assert_allclose(dequantized.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("datatype", ["iv", "iv-kmeans"])
def test_levels_over_a_sliding_window_are_those_of_the_block_and_the_next(datatype):
    x, quantizer = torch.randn(2, 2, 256, 7) ** 3, IntrinsicValueQuantizer(scheme(datatype, group_size=32, lookahead_blocks=3))
    skip = torch.zeros(2, 256, dtype=torch.bool)
    skip[:, 100:110] = True
    encoded = quantizer.encode(x, skip)
    assert encoded.tokens == 192 and encoded.ranges["levels"].shape == (2, 2, 6, 4)
    how = "kmeans" if datatype == "iv-kmeans" else "frequency"
    for row, head, block in np.ndindex(2, 2, 6):
        window = slice(32 * block, 32 * block + 96)
        found = IntrinsicValues.of(x[row, head, window][~skip[row, window]], how=how)
        np.testing.assert_allclose(encoded.ranges["levels"][row, head, block].numpy(), found.levels, rtol=1e-3, atol=1e-3)
    for start in range(0, 192, 32):  # however many blocks are encoded at once
        alone = quantizer.encode(x[:, :, start : start + 96], skip[:, start : start + 96])
        assert torch.equal(alone.codes, encoded.codes[:, :, start : start + 32])


def test_the_nearest_level_misses_less_than_the_level_below():
    x = torch.randn(2, 2, 128, 32)
    off = {}
    for round_down in (True, False):
        quantizer = IntrinsicValueQuantizer(scheme("iv-kmeans", round_down))
        off[round_down] = (quantizer.dequantize(quantizer.encode(x)) - x).abs().mean()
    assert off[False] < 0.7 * off[True]


@pytest.mark.parametrize("datatype", ["iv", "iv-kmeans"])
def test_tokens_that_are_skipped_have_no_part_in_the_levels(datatype):
    x = torch.randn(2, 2, 64, 8)
    skip = torch.zeros(2, 64, dtype=torch.bool)
    skip[0, :5] = True
    skip[1] = True
    wild = x.masked_fill(skip[:, None, :, None], 1e9)
    levels = IntrinsicValueQuantizer(scheme(datatype)).encode(wild, skip).ranges["levels"]
    assert torch.equal(levels[1], torch.zeros(2, 1, 4).half())
    for head in range(2):
        expected = IntrinsicValues.of(x[0, head, 5:], how="kmeans" if datatype == "iv-kmeans" else "frequency")
        np.testing.assert_allclose(levels[0, head, 0].numpy(), expected.levels, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("datatype", ["iv", "iv-kmeans"])
@pytest.mark.parametrize("round_down", [True, False])
def test_constant_blocks_are_exact(datatype, round_down):
    x = torch.full((1, 2, 64, 8), 2.5)
    quantizer = IntrinsicValueQuantizer(scheme(datatype, round_down))
    assert torch.equal(quantizer.dequantize(quantizer.encode(x)), x)


def test_a_single_element_that_is_not_skipped_is_exact():
    x, skip = torch.randn(1, 1, 8, 1).half().float(), torch.ones(1, 8, dtype=torch.bool)
    skip[0, 3] = False
    quantizer = IntrinsicValueQuantizer(scheme("iv-kmeans", group_size=8))
    assert torch.equal(quantizer.dequantize(quantizer.encode(x, skip))[0, 0, 3], x[0, 0, 3])


def test_elements_beyond_float16_are_refused():
    with pytest.raises(ActivationError, match="float16"):
        IntrinsicValueQuantizer(scheme()).encode(torch.full((1, 1, 64, 8), 1e6))
