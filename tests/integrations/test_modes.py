"""Every way in which people generate: the exact recipe gives the tokens of DynamicCache, packed recipes their own."""

import copy

import pytest
import torch
from tests.conftest import asset
from transformers import DynamicCache, pipeline

from narrowkv import PackedCache, calibrate, get_recipe
from narrowkv.errors import CacheUseError, UnsupportedModelError

RECIPES = ["fp16", "int4"]


def generate(model, ids, cache, tokens=30, **options):
    options = {"do_sample": False, "pad_token_id": 0, **options}
    with torch.inference_mode():
        return model.generate(ids, past_key_values=cache, max_new_tokens=tokens, **options)


MODES = {
    "greedy": {},
    "beam search": {"num_beams": 3},
    "beam search, all returned": {"num_beams": 3, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 10},
    "long": {"tokens": 100},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_of_dynamic_cache(tiny, mode, batch):
    if mode == "prompt lookup" and batch > 1:
        pytest.skip("transformers does prompt lookup for one sequence only")
    model = tiny()
    ids = torch.randint(2, 12, (batch, 40))
    options = dict(MODES[mode])
    if batch > 1:
        options["attention_mask"] = torch.ones_like(ids)
        options["attention_mask"][0, :9] = 0
        options["attention_mask"][2, :33] = 0
    expected = generate(model, ids, DynamicCache(), **options)
    assert torch.equal(generate(model, ids, PackedCache(model, "fp16"), **options), expected)


def test_several_return_sequences_by_sampling(tiny):
    model, ids = tiny(), torch.randint(2, 97, (2, 30))
    found = []
    for cache in (DynamicCache(), PackedCache(model, "fp16")):
        torch.manual_seed(3)
        found.append(generate(model, ids, cache, do_sample=True, num_return_sequences=3))
    assert torch.equal(*found)


def test_assisted_decoding(tiny):
    model, assistant = tiny(), tiny(layers=1)
    ids = torch.randint(2, 97, (1, 30))
    expected = generate(model, ids, DynamicCache())
    found = generate(model, ids, PackedCache(model, "fp16"), assistant_model=assistant)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("recipe", ["int4", "nuq3-1%"])
@pytest.mark.parametrize("mode", ["chunked prefill", "prompt lookup", "assisted", "sampling", "padded", "beam search"])
def test_a_packed_recipe_generates_the_same_tokens_in_every_mode(tiny, recipe, mode):
    """Strictly read, a number is what it is from the moment it arrives: chunks, crops and batches change nothing."""
    model, ids = tiny().double(), torch.randint(2, 12, (3, 70))
    if recipe != "int4":
        recipe = calibrate(model, ids, recipe)

    def ours(rows=slice(0, 1), **options):
        return generate(model, ids[rows], PackedCache(model, recipe, strict=True), 40, **options)

    expected = ours()
    if mode == "assisted":
        assert torch.equal(ours(assistant_model=tiny(layers=1).double()), expected)
    elif mode == "sampling":
        drawn = []
        for options in ({}, {"prefill_chunk_size": 9}):
            torch.manual_seed(4)
            drawn.append(ours(do_sample=True, num_return_sequences=2, **options))
        assert torch.equal(*drawn)
    elif mode == "padded":
        padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), ids], dim=1)
        found = generate(model, padded, PackedCache(model, recipe, strict=True), 40, attention_mask=(padded > 0).long())
        assert torch.equal(found[:1, 5:], expected)
    elif mode == "beam search":
        assert torch.equal(ours(num_beams=3, prefill_chunk_size=7), ours(num_beams=3))
    else:
        assert torch.equal(ours(**MODES[mode]), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_beams_of_a_packed_recipe_are_those_of_single_rows(tiny, recipe):
    """Beam search on a batch is beam search on each of its rows."""
    model, ids = tiny(), torch.randint(2, 97, (2, 80))
    together = generate(model, ids, PackedCache(model, recipe), num_beams=2)
    for row in range(2):
        alone = generate(model, ids[row : row + 1], PackedCache(model, recipe), num_beams=2)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_copy_is_a_shared_prefix(tiny, recipe):
    model, prefix = tiny(), torch.randint(2, 97, (1, 150))
    shared = PackedCache(model, recipe)
    with torch.inference_mode():
        model(prefix, past_key_values=shared)
    pages = {id(column.page) for layer in shared.packed for column in layer.store.blocks.columns}
    for _ in range(2):
        prompt = torch.cat([prefix, torch.randint(2, 97, (1, 9))], dim=1)
        cache = copy.deepcopy(shared)
        assert {id(column.page) for layer in cache.packed for column in layer.store.blocks.columns} == pages
        found = generate(model, prompt, cache, 80)
        fresh = PackedCache(model, recipe)
        with torch.inference_mode():
            model(prefix, past_key_values=fresh)
        assert torch.equal(found, generate(model, prompt, fresh, 80))
        assert shared.get_seq_length() == 150


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_can_be_repeated_selected_and_dropped(tiny, recipe):
    model, ids = tiny(), torch.randint(2, 97, (2, 100))
    step = torch.randint(2, 97, (4, 1))

    def after(change):
        cache = PackedCache(model, recipe)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
            change(cache)
            return cache, model(step[: cache.batch_size], past_key_values=cache).logits

    repeated, logits = after(lambda cache: cache.batch_repeat_interleave(2))
    assert repeated.batch_size == 4
    _, selected = after(lambda cache: cache.batch_select_indices(torch.tensor([0, 0, 1, 1])))
    assert torch.equal(logits, selected)
    one, logits_one = after(lambda cache: cache.batch_select_indices(torch.tensor([1])))
    assert one.batch_size == 1
    alone = PackedCache(model, recipe)
    with torch.inference_mode():
        model(ids[1:], past_key_values=alone)
        torch.testing.assert_close(logits_one, model(step[:1], past_key_values=alone).logits, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("drop", [0, 1, 30, 90, 100])
def test_a_cropped_cache_goes_on_as_if_nothing_had_been(tiny, recipe, drop):
    model, ids = tiny().double(), torch.randint(2, 97, (2, 100))
    cache = PackedCache(model, recipe, strict=True)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        cache.crop(-drop)
        assert cache.get_seq_length() == 100 - drop
        again = torch.cat([ids[:, 100 - drop :], torch.randint(2, 97, (2, 3))], dim=1)
        found = model(again, past_key_values=cache).logits
        fresh = PackedCache(model, recipe, strict=True)
        expected = model(torch.cat([ids[:, : 100 - drop], again], dim=1), past_key_values=fresh).logits[:, -again.shape[1] :]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_impossible_crops_are_refused(tiny):
    model = tiny()
    cache = PackedCache(model, "int4")
    with torch.inference_mode():
        model(torch.randint(2, 97, (1, 5)), past_key_values=cache)
    with pytest.raises(CacheUseError, match="minus the number"):
        cache.crop(3)
    assert cache.is_croppable
    assert not PackedCache(model, get_recipe("int4").with_options(residual_length=8)).is_croppable
    with pytest.raises(UnsupportedModelError, match="not offloaded"):
        cache.offload(0, only_non_sliding=False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_text_generation_pipeline_and_streaming(recipe):
    folder = str(asset("models", "stories260K"))
    speak = pipeline("text-generation", model=folder)
    prompt, seen = "Once upon a time", []

    class Streamer:
        def put(self, ids):
            seen.append(ids)

        def end(self):
            seen.append(None)

    options = {"max_new_tokens": 40, "do_sample": False, "return_full_text": False}
    expected = speak(prompt, **options)[0]["generated_text"]
    cache = PackedCache(speak.model, recipe)
    found = speak(prompt, past_key_values=cache, streamer=Streamer(), **options)[0]["generated_text"]
    assert found[:20] == expected[:20]
    if recipe == "fp16":
        assert found == expected
    assert len(seen) == 42 and cache.get_seq_length() > 40


def test_a_compiled_model_decodes_the_same_and_says_why_the_cache_is_not_traced(tiny):
    model, ids = tiny(), torch.randint(2, 97, (1, 40))

    def decode(forward):
        cache, found = PackedCache(model, "int4"), []
        with torch.inference_mode():
            token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            for _ in range(5):
                token = forward(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                found.append(token.item())
        return found

    torch.compiler.reset()
    assert decode(torch.compile(model.forward, backend="eager")) == decode(model.forward)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a packed cache grows page by page"):
        decode(torch.compile(model.forward, backend="eager", fullgraph=True))
    torch.compiler.reset()
