"""Ranges: what keys reach at any position, and values as they are."""

import pytest
import torch
from transformers import DynamicCache

from narrowkv.attention.rope import Rope
from narrowkv.exports import observe_ranges
from narrowkv.exports.ranges import any_position
from narrowkv.integrations.preparation import model_info_for


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [8, 16])
def test_no_position_exceeds_the_range_and_some_position_reaches_it(interleaved, rotary):
    rope = Rope(10.0 ** -torch.linspace(0, 3, rotary // 2), interleaved=interleaved)
    keys, positions = torch.randn(2, 3, 5, 16), torch.randint(0, 100, (2, 5))
    bound = any_position(rope.rotate(keys, positions), rope, positions)
    reached = torch.zeros_like(keys)
    for position in range(0, 40_000, 7):
        reached = torch.maximum(reached, rope.rotate(keys, torch.full((2, 5), position)).abs())
    assert (reached <= bound * (1 + 1e-5)).all() and torch.allclose(reached, bound, rtol=2e-2)
    assert torch.equal(bound[..., rotary:], keys[..., rotary:].abs())


def test_keys_that_are_not_rotated_are_as_large_as_they_are():
    keys = torch.randn(1, 1, 3, 8)
    assert torch.equal(any_position(keys, None, None), keys.abs())


@pytest.mark.parametrize("heads", [1, 2])
def test_ranges_cover_what_a_model_stores(tiny, heads):
    model = tiny(kv_heads=heads)
    info, batches = model_info_for(model, "auto", []), [torch.randint(2, 97, (1, 63)), torch.randint(2, 97, (3, 20))]
    ranges = observe_ranges(model, info, batches)
    values, keys = ([torch.zeros(heads, 16) for _ in range(2)] for _ in range(2))
    for ids in batches:
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        for i, layer in enumerate(cache.layers):
            keys[i] = torch.maximum(keys[i], layer.keys.abs().amax((0, 2)))
            values[i] = torch.maximum(values[i], layer.values.abs().amax((0, 2)))
    for i, one in enumerate(ranges):
        assert (one.keys >= keys[i] * (1 - 1e-5)).all() and torch.allclose(one.values, values[i], rtol=1e-5)
