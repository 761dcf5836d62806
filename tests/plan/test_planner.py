"""The plan counts what caches really allocate."""

from dataclasses import replace

import pytest
import torch
import transformers
from tests.conftest import make_tiny
from tests.families import make

from narrowkv import PackedCache, calibrate, get_recipe
from narrowkv.codec import Outliers
from narrowkv.errors import BudgetError, OutputError, RecipeError
from narrowkv.evaluate.results import ResultFile, read_result
from narrowkv.plan.layers import CHUNK, DECODED, LayerBytes, LayerShape, nbytes, stand_in
from narrowkv.plan.models import read_shape
from narrowkv.plan.planner import Budget, CacheBytes, plan
from narrowkv.store import LayerStore


def shape_of(model, folder):
    model.config.save_pretrained(folder)
    return read_shape(str(folder), str(model.dtype).removeprefix("torch."))


def real_bytes(model, source, tokens, batch, chunk=CHUNK):
    """Bytes of a real cache behind a prompt, and 65 tokens later."""
    cache = PackedCache(model, source, backend="torch")
    ids = torch.randint(2, 97, (batch, tokens + DECODED))
    counts = []
    with torch.inference_mode():
        for part in ids[:, :tokens].split(chunk, dim=1):
            model(part, past_key_values=cache, use_cache=True)
        counts.append(cache.nbytes)
        for token in ids[:, tokens:].split(1, dim=1):
            model(token, past_key_values=cache, use_cache=True)
        counts.append(cache.nbytes)
    return counts


def as_trained(model):
    """The model with biases and gains that do something."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def planned(shape, recipe, tokens, batch):
    found = CacheBytes(shape, recipe, batch).allocated(tokens)
    return [found.prompt, found.decoding]


def without_outliers(name):
    """A recipe whose bytes do not depend on how many outliers a text has."""
    recipe = get_recipe(name)
    if recipe.search_space is None:
        return recipe
    exact = {}
    for side in ("keys", "values"):
        exact[side] = tuple(replace(scheme, outliers=Outliers()) for scheme in getattr(recipe.search_space, side))
    return replace(
        recipe, keys=exact["keys"][0], values=exact["values"][0], search_space=replace(recipe.search_space, **exact)
    )


def calibrated(model, name):
    torch.manual_seed(1)
    return calibrate(model, list(torch.randint(2, 97, (4, 256)).split(1)), without_outliers(name))


@pytest.mark.parametrize("name", ["fp16", "int3", "kivi-2", "nvfp4", "intrinsic-2-nearest-w4"])
@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (63, 3), (704, 2)])
def test_bytes_are_those_of_a_real_cache(name, tokens, batch, tmp_path):
    model = make_tiny(dtype=torch.bfloat16, head_dim=32)
    assert planned(shape_of(model, tmp_path), get_recipe(name), tokens, batch) == real_bytes(model, name, tokens, batch)


@pytest.mark.parametrize("name", ["nuq3", "int4-channel", "smooth-int4", "narrow2", "narrow-k2.25-v2", "narrow2-equal"])
def test_tables_and_positions_are_counted(name, tmp_path):
    model = make_tiny(dtype=torch.bfloat16, head_dim=32)
    source, shape = calibrated(model, name), shape_of(model, tmp_path)
    for tokens, batch in ((63, 3), (300, 1)):
        assert planned(shape, source.recipe, tokens, batch) == real_bytes(model, source, tokens, batch)


@pytest.mark.parametrize("name", ["fp16", "int4", "hadamard-int4", "nvfp4", "nuq3", "narrow2"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text"])
def test_bytes_of_a_bias_and_of_norm_gains_are_counted(family, name, tmp_path):
    model = as_trained(make(family)).bfloat16()
    source = calibrated(model, name) if get_recipe(name).needs_calibration else get_recipe(name)
    recipe, shape = getattr(source, "recipe", source), shape_of(model, tmp_path)
    for tokens, batch in ((63, 3), (300, 1)):
        assert planned(shape, recipe, tokens, batch) == real_bytes(model, source, tokens, batch)


@pytest.mark.parametrize("name", ["fp16", "int2", "kivi-4", "hadamard-int4", "nuq2"])
@pytest.mark.parametrize(("tokens", "batch"), [(2500, 1), (4900, 3)])
def test_bytes_of_long_contexts_are_extrapolated_exactly(name, tokens, batch):
    recipe = get_recipe(name)
    shape = LayerShape(batch, 1, 80 if name != "kivi-4" else 96, torch.float16)
    quantizers = tuple(stand_in(scheme, 1, shape.head_dim) for scheme in (recipe.keys, recipe.values))
    found = LayerBytes(quantizers, recipe.sinks, recipe.residual_length, shape).allocated(tokens)
    elements = torch.randn(batch, 1, tokens + DECODED, shape.head_dim).half()
    assert (found.prompt, found.decoding) == stored(
        LayerStore(*quantizers, recipe.sinks, recipe.residual_length), elements, elements, tokens
    )


def stored(store, keys, values, tokens):
    store.append(keys[:, :, :tokens], values[:, :, :tokens])
    prompt = nbytes(store.tensors())
    for token in range(tokens, tokens + DECODED):
        store.append(keys[:, :, token : token + 1], values[:, :, token : token + 1])
    return prompt, nbytes(store.tensors())


@pytest.mark.parametrize(("tokens", "batch"), [(63, 3), (2500, 2)])
def test_outliers_are_counted_exactly_where_there_are_as_many_as_the_recipe_says(tokens, batch):
    """Other elements than those counted with, at other positions, but as many beyond the thresholds in every 64 tokens."""
    recipe = get_recipe("nuq3-1%")
    shape = LayerShape(batch, 2, 64, torch.float32)
    quantizers = tuple(stand_in(scheme, 2, 64) for scheme in (recipe.keys, recipe.values))
    beyond = torch.zeros(batch, 2 * 64 * 64)
    count = round(recipe.keys.outliers.fraction * beyond.shape[1])
    for row in beyond:
        row[torch.randperm(len(row))[:count]] = 1
    keys = torch.rand(batch, 2, 64, 64) / 4 + 2 * beyond.view(batch, 2, 64, 64)
    keys = keys.repeat(1, 1, (tokens + DECODED) // 64 + 1, 1)
    values = torch.randn_like(keys)  # whose ranges are taken online: half at each end, whatever the elements
    found = LayerBytes(quantizers, 0, 0, shape).allocated(tokens)
    assert (found.prompt, found.decoding) == stored(LayerStore(*quantizers), keys, values, tokens)


def test_outliers_of_a_real_model_are_about_as_many(tmp_path):
    model = make_tiny(dtype=torch.bfloat16, heads=8, kv_heads=4, head_dim=32)
    source, shape = calibrated(model, "nuq3-1%"), shape_of(model, tmp_path)
    for ours, real in zip(planned(shape, source.recipe, 704, 2), real_bytes(model, source, 704, 2), strict=True):
        assert real == pytest.approx(ours, rel=0.03)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text", "qwen2_5_vl", "phi3, longrope", "opt", "mixtral", "lfm2"])
def test_families(family, tmp_path):
    if family == "phi3, longrope" and transformers.__version__.startswith("5.19."):
        pytest.skip("transformers 5.19 asks this family's positions for elements, which there are none of without memory")
    model = as_trained(make(family))
    source = calibrated(model, "nuq2") if family in ("qwen2_5_vl", "phi3, longrope", "gemma4_text") else get_recipe("int3")
    recipe = source if family in ("opt", "gemma3_text", "mixtral", "lfm2") else source.recipe
    assert planned(shape_of(model, tmp_path), recipe, 130, 2) == real_bytes(model, source, 130, 2)


def test_sliding_windows_store_no_more_for_longer_texts(tmp_path):
    model = make_tiny("mistral", dtype=torch.bfloat16, sliding_window=100, layers=1)
    shape, tokens = shape_of(model, tmp_path), 4 * CHUNK + 130
    assert planned(shape, get_recipe("int2"), tokens, 1) == real_bytes(model, "int2", tokens, 1)
    cache = CacheBytes(shape, get_recipe("int2"))
    assert cache.allocated(tokens) == cache.allocated(tokens + 1000 * CHUNK)
    assert cache.longest(cache.allocated(4 * CHUNK).most) is None


def test_the_longest_context_is_the_longest():
    shape = read_shape("llama-3-8b")
    cache = CacheBytes(shape, get_recipe("nuq2"), devices=8)
    for room in (10**5, 10**7, 10**10):
        longest = cache.longest(room)
        assert cache.allocated(longest + 64).most > room
        assert not longest or cache.allocated(longest).most <= room


def test_published_figures():
    """KVQuant: LLaMA-7B with 128K tokens in GB of 2^30 bytes; 1M and 10M with nuq2."""
    shape = read_shape("llama-7b")
    assert shape.weights == 6_738_415_616
    published = {"fp16": 64.0, "nuq4": 16.0, "nuq4-1%": 17.3, "nuq3": 12.0, "nuq3-1%": 13.3, "nuq2": 8.0, "nuq2-1%": 9.3}
    for name, size in published.items():
        assert CacheBytes(shape, get_recipe(name)).allocated(2**17).prompt / 2**30 == pytest.approx(size, abs=0.05)
    cache = CacheBytes(shape, get_recipe("nuq2"))
    assert cache.allocated(2**20).prompt / 2**30 == pytest.approx(64.1, abs=0.05)
    assert cache.allocated(10**7).prompt / 2**30 == pytest.approx(611.6, abs=0.05)


def test_heads_are_split_between_devices_and_copied_where_there_are_too_few():
    shape, recipe = read_shape("llama-3-8b"), get_recipe("int4")
    bytes_of = {gpus: CacheBytes(shape, recipe, devices=gpus).allocated(2**16).prompt for gpus in (1, 2, 8, 16)}
    assert bytes_of[1] / 2 < bytes_of[2] < bytes_of[1] / 1.9  # each token has a scale in every device
    assert bytes_of[8] == bytes_of[16]
    # transformers 5.19 does not divide the embedding: every device holds it
    copied = 0 if "model.embed_tokens" in make_tiny().tp_plan else 7 * 128256 * 4096 * 2
    assert shape.weight_bytes(8) * 8 == pytest.approx(shape.weight_bytes(1) + copied, rel=1e-3)
    with pytest.raises(BudgetError, match="divisor or a multiple of 8"):
        CacheBytes(shape, recipe, devices=3)


def test_rows_are_added_once_and_an_impossible_budget_is_refused(tmp_path):
    shape, steps = read_shape("llama-7b"), []
    results = ResultFile(tmp_path / "plan.json", "plan", "", {})
    recipes = [get_recipe("fp16"), get_recipe("nuq2")]
    budget = Budget(memory=80 * 2**30)
    for _ in range(2):
        plan(shape, recipes, [2**20], budget, results, lambda done, total: steps.append((done, total)))
    fp16, nuq2 = read_result(tmp_path / "plan.json")["rows"]
    assert steps == [(1, 2), (2, 2)] * 2
    assert fp16["contexts"][0]["fits"] == "no"
    assert nuq2["contexts"][0]["fits"] == "prompt only"
    assert 2**19 < nuq2["longest"] < 2**20
    with pytest.raises(OutputError, match="another recipe called fp16"):
        plan(shape, [recipes[0].with_options(sinks=3)], [2**20], budget, results)
    with pytest.raises(BudgetError, match=r"12\.6 GiB of each GPU's 7\.5 GiB"):
        plan(shape, recipes, [2**20], Budget(memory=8 * 10**9), results)
    with pytest.raises(BudgetError, match="at least"):
        Budget(batch=0)
    with pytest.raises(RecipeError, match="head_dim of 128"):
        CacheBytes(shape, get_recipe("int4-head-g96"))
