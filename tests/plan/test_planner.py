"""The plan counts what caches really allocate."""

import pytest
import torch
from tests.conftest import make_tiny
from tests.families import make

from narrowkv import PackedCache, calibrate, get_recipe
from narrowkv.errors import BudgetError
from narrowkv.plan.models import AttentionShape, ModelShape
from narrowkv.plan.planner import CacheBytes

DECODED = 65


def shape_of(cache, model, record="positions"):
    layers = [
        AttentionShape(i, *shape, layer.sliding_window, record)
        for i, (shape, layer) in enumerate(zip(cache.shapes, cache.packed, strict=True))
    ]
    return ModelShape("tiny", model.dtype, 1, 0, tuple(layers), 0)


def real_bytes(model, source, tokens, batch):
    """Bytes of a real cache behind a prompt, and 65 tokens later."""
    cache = PackedCache(model, source)
    ids = torch.randint(2, 97, (batch, tokens + DECODED))
    counts = []
    with torch.inference_mode():
        model(ids[:, :tokens], past_key_values=cache, use_cache=True)
        counts.append(cache.nbytes)
        for token in ids[:, tokens:].split(1, dim=1):
            model(token, past_key_values=cache, use_cache=True)
        counts.append(cache.nbytes)
    return counts, cache


@pytest.mark.parametrize("name", ["fp16", "int3", "kivi-2", "nvfp4", "hadamard-int4", "intrinsic-2-nearest-w4"])
@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (63, 3), (704, 2), (2500, 1)])
def test_bytes_are_those_of_a_real_cache(name, tokens, batch):
    model = make_tiny(dtype=torch.bfloat16, head_dim=32)
    expected, cache = real_bytes(model, name, tokens, batch)
    held = CacheBytes(shape_of(cache, model), get_recipe(name), batch).held(tokens)
    assert [held.prompt, held.decoding] == expected


def calibrated(model, name):
    torch.manual_seed(1)
    return calibrate(model, list(torch.randint(2, 97, (4, 256)).split(1)), name)


@pytest.mark.parametrize("name", ["nuq3", "int4-channel", "smooth-int4", "channel2", "pair2.5", "narrow3"])
@pytest.mark.parametrize(("tokens", "batch"), [(63, 3), (2500, 1)])
def test_learned_tables_and_positions_are_counted(name, tokens, batch):
    model = make_tiny(dtype=torch.bfloat16, head_dim=32)
    source = calibrated(model, name)
    expected, cache = real_bytes(model, source, tokens, batch)
    held = CacheBytes(shape_of(cache, model), source.recipe, batch).held(tokens)
    assert [held.prompt, held.decoding] == expected


@pytest.mark.parametrize("name", ["nuq3-1%", "pair3-2%", "nuq2-1%-qnorm"])
@pytest.mark.parametrize(("tokens", "batch"), [(63, 3), (704, 2), (2500, 1)])
def test_outliers(name, tokens, batch):
    model = make_tiny(dtype=torch.bfloat16, heads=8, kv_heads=4, head_dim=32)
    source = calibrated(model, name)
    expected, cache = real_bytes(model, source, tokens, batch)
    held = CacheBytes(shape_of(cache, model), source.recipe, batch).held(tokens)
    print(name, tokens, batch, [held.prompt, held.decoding], expected, held.prompt / expected[0], held.decoding / expected[1])
