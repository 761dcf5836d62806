"""The plumbing: an exact recipe gives the tokens of DynamicCache, in every shape and dtype."""

import pytest
import torch
from tests.families import make
from transformers import DynamicCache

from narrowkv import PackedCache, Recipe, calibrate, get_recipe
from narrowkv.codec import Quantization, Scheme, Transform
from narrowkv.errors import CacheUseError, RecipeError, UnsupportedModelError

UNROTATED = Recipe(
    "unrotated", keys=Scheme(Quantization(16, "exact"), Transform(pre_rope=True)), values=Scheme(Quantization(16, "exact"))
)
SHAPES = {
    "gqa": {"heads": 4, "kv_heads": 2},
    "mqa": {"heads": 4, "kv_heads": 1},
    "mha": {"heads": 3, "kv_heads": 3},
    "head_dim 8": {"heads": 2, "kv_heads": 1, "head_dim": 8},
    "head_dim 80": {"heads": 2, "kv_heads": 2, "head_dim": 80},
}
EXTRAS = {
    "llama": [{}, {"attention_bias": True}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}],
    "mistral": [{}, {"sliding_window": 24}],
    "qwen2": [{}],
}


def greedy(model, ids, cache, tokens=40, **options):
    with torch.inference_mode():
        return model.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", EXTRAS)
def test_exact_recipe_gives_the_tokens_of_dynamic_cache(tiny, family, shape):
    for extra in EXTRAS[family]:
        model = tiny(family, **SHAPES[shape], **extra)
        ids = torch.randint(2, 97, (1, 45))
        assert torch.equal(greedy(model, ids, PackedCache(model, "fp16")), greedy(model, ids, DynamicCache()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_in_every_dtype_and_with_either_attention(tiny, dtype, attention):
    model = tiny(dtype=dtype, attn_implementation=attention)
    ids = torch.randint(2, 97, (2, 30))
    expected = greedy(model, ids, DynamicCache())
    cache = PackedCache(model, "fp16")
    assert torch.equal(greedy(model, ids, cache), expected)
    assert torch.equal(greedy(model, ids, DynamicCache()), expected)  # foreign caches go on as before
    stored = cache.packed[0].store.length
    assert cache.bits_per_element < 8 * dtype.itemsize * 1.02 * 128 / stored  # space for two blocks


@pytest.mark.parametrize("family", EXTRAS)
def test_left_padding(tiny, family):
    model = tiny(family)
    ids = torch.randint(2, 97, (3, 40))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[2, :33] = 0
    expected = greedy(model, ids, DynamicCache(), attention_mask=mask)
    assert torch.equal(greedy(model, ids, PackedCache(model, "fp16"), attention_mask=mask), expected)
    assert not torch.equal(greedy(model, ids, PackedCache(model, "fp16")), expected)


@pytest.mark.parametrize("recipe", ["int3", "int2"])
@pytest.mark.parametrize("chunk", [1, 30, 100])
@pytest.mark.parametrize("whole_mask", [False, True], ids=["mask so far", "whole mask at every chunk"])
def test_each_row_of_a_padded_batch_is_what_it_is_alone(tiny, recipe, chunk, whole_mask):
    """Also with sinks and a window, in chunks: padding changes nothing. float64, so that no code falls otherwise."""
    model = tiny().double()
    # what has left an exact window depends on where a chunk ends, which is not the same for the row alone
    source = get_recipe(recipe).with_options(sinks=3, residual_length=0 if chunk == 30 else 5)
    long, short = torch.randint(2, 97, (1, 100)), torch.randint(2, 97, (1, 53))
    batch = torch.cat([long, torch.cat([torch.zeros(1, 47, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :47] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits = PackedCache(model, source, strict=True), []
    with torch.inference_mode():
        for start in range(0, 100, chunk):
            stop = min(start + chunk, 100)
            seen = mask if whole_mask else mask[:, :stop]
            options = {"attention_mask": seen, "position_ids": positions[:, start:stop]}
            logits.append(model(batch[:, start:stop], past_key_values=cache, **options).logits)
    together = torch.cat(logits, dim=1)
    for row, alone in enumerate((long, short)):
        expected = tokens_after(model, source, alone, chunk)[0]
        torch.testing.assert_close(together[row, -len(expected) :], expected, atol=1e-6, rtol=1e-6)
        assert cache.packed[0].store.sinks.index[row].tolist() == [100 - len(expected) + i for i in range(3)]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_prompts_of_any_length(tiny, length):
    model = tiny()
    ids = torch.randint(2, 97, (1, length))
    assert torch.equal(greedy(model, ids, PackedCache(model, "fp16"), 70), greedy(model, ids, DynamicCache(), 70))


def test_several_turns_on_one_cache(tiny):
    model = tiny()
    ours, theirs = PackedCache(model, "fp16"), DynamicCache()
    ids = expected = torch.randint(2, 97, (1, 20))
    for _ in range(3):
        ids, expected = greedy(model, ids, ours, 15), greedy(model, expected, theirs, 15)
        assert torch.equal(ids, expected)
        turn = torch.randint(2, 97, (1, 10))
        ids, expected = torch.cat([ids, turn], dim=1), torch.cat([expected, turn], dim=1)
    assert ours.get_seq_length() == theirs.get_seq_length()
    ours.reset()
    assert ours.get_seq_length() == 0 and ours.elements == 0
    assert torch.equal(greedy(model, turn, ours), greedy(model, turn, DynamicCache()))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_prefill_in_chunks(tiny, chunk):
    model = tiny()
    ids = torch.randint(2, 97, (2, 100))
    expected = greedy(model, ids, DynamicCache())
    assert torch.equal(greedy(model, ids, PackedCache(model, "fp16"), prefill_chunk_size=chunk), expected)


def tokens_after(model, source, ids, chunks, strict=True):
    cache = PackedCache(model, source, strict=strict)
    with torch.inference_mode():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("name", ["int4", "int2", "nuq3-1%", "narrow3"])
def test_strict_results_do_not_depend_on_how_the_text_is_cut(tiny, name):
    model = tiny().double()  # in float32 other matrix shapes round otherwise, which may move a number to the next code
    ids = torch.randint(2, 97, (2, 150))
    recipe = get_recipe(name).with_options(sinks=2)
    source = calibrate(model, ids.split(1), recipe) if recipe.needs_calibration else recipe
    whole = tokens_after(model, source, ids, 150)
    for chunks in (1, 50, 64, 149):
        torch.testing.assert_close(tokens_after(model, source, ids, chunks), whole, atol=1e-6, rtol=1e-6)


def test_stream_mode_attends_exactly_to_the_chunk_itself(tiny):
    model = tiny()
    ids = torch.randint(2, 97, (1, 64))
    with torch.inference_mode():
        expected = model(ids).logits
    torch.testing.assert_close(tokens_after(model, "int2", ids, 64, strict=False), expected)
    assert (tokens_after(model, "int2", ids, 32, strict=False) - expected)[:, 32:].abs().max() > 0.1
    assert (tokens_after(model, "int2", ids, 64, strict=True) - expected).abs().max() > 0.1


def test_eight_bits_stay_close_to_sixteen(tiny):
    for family in EXTRAS:
        model = tiny(family)
        ids = torch.randint(2, 97, (2, 100))
        with torch.inference_mode():
            expected = model(ids).logits
        found = tokens_after(model, "int8", ids, 30)
        assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_a_changed_batch_is_refused(tiny):
    model = tiny()
    cache = PackedCache(model, "int4")
    with torch.inference_mode():
        model(torch.randint(2, 97, (2, 5)), past_key_values=cache)
        with pytest.raises(CacheUseError, match=r"has batch 2.*batch 3"):
            model(torch.randint(2, 97, (3, 1)), past_key_values=cache)


def test_an_empty_prompt_is_refused(tiny):
    model = tiny()
    with pytest.raises(CacheUseError, match="empty"), torch.inference_mode():
        model(torch.zeros(1, 0, dtype=torch.long), past_key_values=PackedCache(model, "int4"))


def test_layers_may_have_recipes_of_their_own(tiny):
    model = tiny()
    exact = Scheme(Quantization(16, "exact"))
    mixed = get_recipe("int4")
    layers = {1: type(mixed.schemes(0))(exact, exact)}
    cache = PackedCache(model, mixed.with_options(layers=layers))
    greedy(model, torch.randint(2, 97, (1, 70)), cache)
    assert [layer.is_exact for layer in cache.packed] == [False, True]
    with pytest.raises(RecipeError, match=r"names layers \[9\]"):
        PackedCache(model, mixed.with_options(layers={9: layers[1]}))


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_a_cache_with_use_cache_false_is_refused(tiny, backend):
    """`generate` would feed the whole text at every step, on top of what is stored."""
    model, ids = tiny(), torch.randint(2, 97, (1, 9))
    with pytest.raises(CacheUseError, match="use_cache is off"):
        model.generate(ids, past_key_values=PackedCache(model, "int4", backend=backend), use_cache=False, max_new_tokens=3)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_that_differ_from_row_to_row(padded, strict):
    """Tokens of a plot see each other whole (Gemma 3): a mask function of the model's own."""
    model = make("gemma3")
    ids = torch.randint(2, 97, (2, 30))
    plots = torch.zeros_like(ids)
    plots[0, 5:12] = plots[1, 15:28] = 1
    mask = {"attention_mask": torch.ones_like(ids).index_fill(1, torch.arange(3), 0)} if padded else {}
    with torch.inference_mode():
        expected = model(input_ids=ids, token_type_ids=plots, past_key_values=DynamicCache(config=model.config), **mask)
        cache = PackedCache(model, UNROTATED, strict=strict)
        found = model(input_ids=ids, token_type_ids=plots, past_key_values=cache, **mask)
        rows = slice(3 if padded else 0, None)
        torch.testing.assert_close(found.logits[:, rows], expected.logits[:, rows], atol=1e-3, rtol=1e-3)


def test_a_prepared_model_runs_with_other_caches_too(tiny):
    model, ids = tiny(), torch.randint(2, 97, (1, 20))
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(ids, **options)
    PackedCache(model, "int4")
    assert torch.equal(model.generate(ids, **options), expected)


def test_the_dense_path_takes_no_mask_of_four_dimensions(tiny):
    model = tiny()
    cache = PackedCache(model, "int4", backend="dense")
    with pytest.raises(UnsupportedModelError, match="2 dimensions only"):
        model(torch.randint(2, 97, (1, 5)), attention_mask=torch.zeros(1, 1, 5, 5), past_key_values=cache)


@pytest.mark.parametrize("recipe", ["int4", "kivi-2-g8-r32", "hadamard-int4"])
def test_the_compiled_attention_gives_the_tokens_of_the_plain_one(tiny, recipe):
    model, ids = tiny(), torch.randint(2, 97, (2, 100))
    found, expected = (greedy(model, ids, PackedCache(model, recipe, backend=backend)) for backend in ("cpu", "torch"))
    assert torch.equal(found, expected)
