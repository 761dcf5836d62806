"""Whatever modes of torch a program is in, caches hold and give the elements that they do without them."""

import contextlib
import copy
import functools
import threading

import pytest
import torch
from tests.conftest import make_tiny
from transformers import DynamicCache

from narrowkv import PackedCache, calibrate, get_recipe
from narrowkv.errors import NarrowKVError

RECIPES = [
    *("fp16", "fp16 with sinks and a window", "int4", "int4 with sinks", "int8", "nf4", "fp8", "nuq3-1%", "nuq2-1%-qnorm"),
    *("kivi-2-g16-r40", "hadamard-int4", "smooth-int8", "nvfp4", "int4-channel", "narrow3", "narrow2"),
    *("intrinsic-2", "intrinsic-2-nearest-kmeans"),
]
FEW = ["fp16", "int4 with sinks", "nuq3-1%", "kivi-2-g16-r40", "hadamard-int4", "narrow3"]
IDS = torch.arange(2 * 90).view(2, 90) * 31 % 95 + 2
TEXT = torch.arange(2 * 60).view(2, 60) ** 2 % 89 + 3  # another than is read: elements that a range ends with are ties


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
}


def recipe_of(name):
    if name == "int4 with sinks":
        return get_recipe("int4").with_options(sinks=2)
    if name == "fp16 with sinks and a window":
        return get_recipe("fp16").with_options(sinks=2, residual_length=20)
    return get_recipe(name)


@functools.cache
def model_and_source(name, dtype=torch.float32):
    model, recipe = make_tiny(dtype=dtype), recipe_of(name)
    return model, calibrate(model, TEXT, recipe) if recipe.needs_calibration else recipe


def run(model, source, backend="auto", prompt=IDS, cache=None):
    """Logits of a prompt in two chunks and of four single tokens, and the cache that holds them."""
    cache = PackedCache(model, source, backend=backend) if cache is None else cache
    mask = (prompt >= 0).long()
    mask[0, :3] = 0
    found = []
    for start, stop in ((0, 70), (70, 86), *((i, i + 1) for i in range(86, 90))):
        options = {"attention_mask": mask[:, :stop], "past_key_values": cache}
        found.append(model(prompt[:, start:stop], **options).logits)
    return torch.cat(found, dim=1), cache


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_cache_gives_what_it_gives_elsewhere(name, surroundings):
    model, source = model_and_source(name)
    for backend in ("auto", "torch", "naive") if name in FEW else ("auto",):
        with torch.no_grad():
            expected, _ = run(model, source, backend)
        with SURROUNDINGS[surroundings](), torch.no_grad():
            found, cache = run(model, source, backend)
        assert torch.equal(found, expected)
        assert not any(tensor.is_inference() or tensor.is_meta for tensor in cache.tensors())


@pytest.mark.parametrize("surroundings", ["bfloat16 by default", "inference mode"])
@pytest.mark.parametrize("name", FEW)
def test_generation_is_the_same_elsewhere(name, surroundings):
    model, source = model_and_source(name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    expected = model.generate(IDS, past_key_values=PackedCache(model, source), **options)
    with SURROUNDINGS[surroundings]():
        assert torch.equal(model.generate(IDS, past_key_values=PackedCache(model, source), **options), expected)


@pytest.mark.parametrize("name", RECIPES)
def test_a_prompt_read_in_inference_mode_goes_on_anywhere(name, tmp_path):
    model, source = model_and_source(name)
    options = {"max_new_tokens": 70, "do_sample": False, "pad_token_id": 0}
    whole = torch.cat([IDS, IDS[:, :3]], dim=1)
    options["attention_mask"] = torch.ones_like(whole)

    def prompt():
        cache = PackedCache(model, source)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
        return cache

    expected = model.generate(whole, past_key_values=prompt(), **options)
    with torch.inference_mode():
        read = prompt()
        copied = copy.deepcopy(read)
        read.save(tmp_path / "c")
        loaded = PackedCache.load(tmp_path / "c", model, source)
        selected = copy.deepcopy(read)
        selected.batch_select_indices([0, 1])
        selected.crop(-1)
        model(IDS[:, -1:], past_key_values=selected)
    found = [model.generate(whole, past_key_values=cache, **options) for cache in (read, copied, loaded)]
    assert all(torch.equal(one, expected) for one in found)
    if read.packed[0].is_croppable:
        assert not any(tensor.is_inference() for tensor in selected.tensors())


@pytest.mark.parametrize("name", RECIPES)
def test_autocast_changes_what_is_stored_and_nothing_else(name, tmp_path):
    model, source = model_and_source(name)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        dynamic, _ = run(model, None, cache=DynamicCache())
        found, cache = run(model, source)
        if name.startswith("fp16"):
            assert torch.equal(found, dynamic)
        dtypes = cache.packed[0].store.dtypes
        assert dtypes[1] == torch.bfloat16 and cache.dtype == dtypes[0]
        cache.save(tmp_path / "c")
        loaded = PackedCache.load(tmp_path / "c", model, source)
        whole = torch.cat([IDS, IDS[:, :2]], dim=1)
        one, two = (model.generate(whole, past_key_values=each, **options) for each in (cache, loaded))
        assert torch.equal(one, two)
        again = run(model, source, "torch")[0]
        assert (again - found).abs().max() < 0.2 * found.abs().max()  # products of 16 bits are rounded otherwise
    with torch.no_grad(), pytest.raises(NarrowKVError, match="go on as it was begun"):
        model(IDS[:, :1], past_key_values=cache)


def test_a_cache_follows_the_dtype_of_its_model(tiny, tmp_path):
    """Made before `model.to`, filled after it: what is stored counts, in memory and on disk."""
    for name in ("fp16", "int4", "kivi-2-g16-r40", "int4 with sinks"):
        model, recipe = tiny(), recipe_of(name)
        cache = PackedCache(model, recipe)
        model.bfloat16()
        with torch.no_grad():
            model(IDS, past_key_values=cache)
            assert cache.dtype == torch.bfloat16
            cache.save(tmp_path / "c")
            loaded = PackedCache.load(tmp_path / "c", model, recipe)
            one, two = (model(IDS[:, :1], past_key_values=each).logits for each in (cache, loaded))
            assert torch.equal(one, two)
            with pytest.raises(NarrowKVError, match="model in bfloat16"):
                PackedCache.load(tmp_path / "c", model.float(), recipe)
            with pytest.raises(NarrowKVError, match="keys in bfloat16 and values in bfloat16, but got keys in float32"):
                model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["fp16", "int4", "nuq3"])
def test_a_cache_follows_frequencies_that_the_model_has_rounded(name, family, tiny):
    """`model.to(dtype)` rounds them, unlike loading in that dtype; tokens are rotated as the model rotates them from then
    on.
    """
    model = tiny(family)
    if family == "qwen2":  # whose bias rotates with the tokens; of integers, which stay as they are
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data = torch.arange(32.0) % 7
    source = calibrate(model, IDS, name) if name == "nuq3" else name
    cache, before = PackedCache(model, source), model.model.rotary_emb.inv_freq
    model.bfloat16().float()
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    for _ in range(2):
        fresh = PackedCache(model, source)
        logits = []
        for each in (cache, fresh):
            with torch.inference_mode():
                model(IDS, past_key_values=each)
                logits.append(model(IDS[:, :1], past_key_values=each).logits)
        assert torch.equal(*logits)
        cache.reset()
        model.model.rotary_emb.inv_freq = before


@pytest.mark.parametrize("surroundings", [*SURROUNDINGS, "autocast of another device"])
def test_a_calibration_is_the_same_elsewhere(surroundings):
    modes = {**SURROUNDINGS, "autocast of another device": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False)}
    for name in ("nuq3-1%", "narrow3", "int4-channel", "smooth-int8"):
        model, expected = model_and_source(name)
        with modes[surroundings]():
            found = calibrate(model, TEXT, name)
        for layer, tables in expected.layers.items():
            for one, other in zip(tables, found.layers[layer], strict=True):
                assert all(torch.equal(table, other.tensors()[key]) for key, table in one.tensors().items())


def test_calibrating_under_autocast():
    def tables(source):
        return {name: table for pair in source.layers.values() for side in pair for name, table in side.tensors().items()}

    for name in ("narrow3", "nuq3-1%"):
        model, outside = model_and_source(name)
        with torch.autocast("cpu", torch.bfloat16):
            inside = calibrate(model, TEXT, name)
        expected, found = tables(outside), tables(inside)
        assert all(table.isfinite().all() for table in found.values()) and found.keys() & expected.keys()
        assert all(found[name].dtype == expected[name].dtype for name in found.keys() & expected.keys())


@pytest.mark.parametrize("name", FEW)
def test_threads_with_caches_of_their_own_do_not_meet(name):
    model, source = model_and_source(name)
    with torch.no_grad():
        expected, _ = run(model, source)
    found = [None] * 3

    def work(i):
        with torch.inference_mode() if i == 1 else torch.no_grad():
            found[i] = run(model, source)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected) for one in found)
