"""Every preset on every backend that a CPU has: what any method must hold to, old or new."""

import pytest
import torch

from narrowkv import PackedCache, calibrate_many, explain, get_recipe
from narrowkv.codec import trellis
from tests.conftest import make_tiny
from tests.presets import PRESETS

BATCH, TOKENS = 3, 63 + 64


@pytest.fixture(scope="module")
def model():
    return make_tiny(head_dim=64)


@pytest.fixture(scope="module")
def sources(request, model):
    """By name, a recipe, or what it learned: those of the tests that were chosen, all learned at once."""
    names = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    recipes = {name: get_recipe(name) for name in names}
    learning = [recipe for recipe in recipes.values() if recipe.needs_calibration]
    ids = torch.randint(2, 97, (2, 200), generator=torch.Generator().manual_seed(3))
    learned = calibrate_many(model, ids.split(1), learning) if learning else []
    return recipes | {calibration.recipe.name: calibration for calibration in learned}


@pytest.fixture
def ids():
    return torch.randint(2, 97, (BATCH, TOKENS))


def read(model, source, ids, backend, strict=True):
    cache = PackedCache(model, source, backend=backend, strict=strict)
    with torch.inference_mode():
        return cache, model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.filterwarnings("ignore::narrowkv.errors.NarrowKVWarning")
def test_a_compiled_encoder_equals_its_reference(model, sources, name, monkeypatch):
    cache = PackedCache(model, sources[name])
    for quantizer in cache.packed[0].store.quantizers:
        tokens = 64 * quantizer.scheme.quantization.lookahead_blocks
        x = torch.randn(BATCH, 2, tokens, 64)
        found = quantizer.encode(x)
        with monkeypatch.context() as plain:
            plain.setattr(trellis, "encode", trellis.encode_naive)
            expected = getattr(quantizer, "encode_naive", quantizer.encode)(x)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(quantizer.dequantize(found), quantizer.dequantize(expected))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.filterwarnings("ignore::narrowkv.errors.NarrowKVWarning")
def test_a_backend_attends_as_the_naive_one_does(model, sources, ids, name, backend):
    """By a prompt, and by tokens that follow it one by one."""
    prompt = TOKENS - 3
    cache, naive = (read(model, sources[name], ids[:, :prompt], kind, strict=False)[0] for kind in (backend, "naive"))
    with torch.inference_mode():
        for i in range(prompt, TOKENS):
            found, expected = (model(ids[:, i : i + 1], past_key_values=one).logits for one in (cache, naive))
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.filterwarnings("ignore::narrowkv.errors.NarrowKVWarning")
def test_a_saved_cache_is_the_same_and_its_bytes_are_all_counted(model, sources, ids, tmp_path, name):
    cache, _ = read(model, sources[name], ids, "auto")
    assert cache.nbytes == explain(cache).nbytes
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in cache.tensors()}
    assert cache.nbytes == sum(storages.values()) and cache.bits_per_element == 8 * cache.nbytes / cache.elements
    cache.save(tmp_path / "cache")
    loaded = PackedCache.load(tmp_path / "cache", model, sources[name], strict=True)
    with torch.inference_mode():
        found, expected = (model(ids[:, :1], past_key_values=one).logits for one in (loaded, cache))
    assert torch.equal(found, expected)
