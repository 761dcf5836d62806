import pytest
import torch

from narrowkv import PackedCache, get_recipe
from narrowkv.errors import ActivationError, CacheUseError, RecipeError, UnsupportedModelError


def run(model, cache, tokens=130, batch=1):
    with torch.inference_mode():
        return model(torch.randint(2, 97, (batch, tokens)), past_key_values=cache).logits


def test_nbytes_is_the_sum_over_real_tensors(tiny):
    model = tiny()
    cache = PackedCache(model, get_recipe("int4").with_options(sinks=2, window=8))
    run(model, cache, tokens=200, batch=3)
    numbers = 2 * 2 * 3 * 2 * 16 * 200  # sides, layers, batch, kv_heads, head_dim, tokens
    assert cache.numbers == numbers
    blocks, tail, window = 3, 0, 8  # 192 tokens have left the window
    per_layer_side = 3 * (
        blocks * 64 * 2 * 16 // 2  # codes
        + (192 + tail) * 4  # scale and zero
        + window * 2 * 16 * 4  # exact, float32
        + 2 * 2 * 16 * 4  # sinks
    )
    # where the sinks are, which of the window are skipped, and in which slots the blocks lie
    rest = 2 * (3 * 2 * 8 + 3 * 8 + 3 * blocks * 8)
    tables = 2 * 2 * (16 + 15) * 4
    assert cache.nbytes == 2 * 2 * per_layer_side + rest + tables
    assert cache.bits_per_element == 8 * cache.nbytes / numbers


def test_an_empty_cache_counts_its_tables(tiny):
    cache = PackedCache(tiny(), "int4")
    assert cache.nbytes == 2 * 2 * (16 + 15) * 4
    assert cache.batch_size == -1
    assert cache.bits_per_element != cache.bits_per_element  # nan


def test_it_says_what_it_is(tiny):
    model = tiny()
    cache = get_recipe("int4").cache(model)
    run(model, cache, 70)
    assert repr(cache).startswith("PackedCache(int4, 70 tokens x 1, ")
    assert cache.backend == "torch"
    assert cache.batch_size == 1


def test_unknown_backends_and_recipes_are_refused(tiny):
    with pytest.raises(RecipeError, match="backend 'gpu'"):
        PackedCache(tiny(), "int4", backend="gpu")
    with pytest.raises(RecipeError, match="no recipe 'q4_0'"):
        PackedCache(tiny(), "q4_0")
    with pytest.raises(RecipeError, match="narrowkv calibrate"):
        PackedCache(tiny(), "nuq3-1%")


def test_a_cache_of_another_model_is_refused(tiny):
    cache = PackedCache(tiny(), "int4")
    for stranger in (tiny(seed=1), tiny(seed=1)):
        with pytest.raises(CacheUseError, match="another model"):
            run(stranger, cache)
        PackedCache(stranger, "int4")  # which prepares it
        with pytest.raises(CacheUseError, match="another model"):
            run(stranger, cache)


def test_a_call_that_failed_leaves_the_cache_as_it_was_or_says_so(tiny):
    model = tiny()
    fresh, cache = (
        PackedCache(model, get_recipe("int4").with_options(sinks=2)),
        PackedCache(model, get_recipe("int4").with_options(sinks=2)),
    )
    for layer in (0, 1):
        weight = model.model.layers[layer].self_attn.v_proj.weight.data
        kept = weight[3].clone()
        weight[3] = float("nan")
        with pytest.raises(ActivationError, match="NaN"):
            run(model, cache)
        weight[3] = kept
        if layer == 1:
            with pytest.raises(CacheUseError, match="half-way"):
                run(model, cache)
            cache.reset()
        torch.manual_seed(9)
        found = run(model, cache)
        torch.manual_seed(9)
        assert torch.equal(found, run(model, fresh))
        for each in (cache, fresh):
            each.reset()


def test_attention_exchanged_behind_our_back_is_noticed(tiny):
    model = tiny()
    cache = PackedCache(model, "int4")
    model.set_attn_implementation("eager")
    with pytest.raises(CacheUseError, match="'eager' after the cache was made"):
        run(model, cache)
    run(model, PackedCache(model, "int4"))


def test_nan_activations_are_refused(tiny):
    model = tiny()
    model.model.layers[1].self_attn.v_proj.weight.data[3] = float("nan")
    with pytest.raises(ActivationError, match="NaN"):
        run(model, PackedCache(model, "int4"))


def test_masks_of_four_dimensions_are_refused(tiny):
    model = tiny()
    with pytest.raises(UnsupportedModelError, match="2 dimensions"), torch.inference_mode():
        model(
            torch.randint(2, 97, (1, 4)),
            attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool),
            past_key_values=PackedCache(model, "int4"),
        )


def test_the_model_is_untouched_without_one_of_our_caches(tiny):
    model = tiny()
    ids = torch.randint(2, 97, (2, 20))
    before = model(ids).logits
    PackedCache(model, "int4")
    PackedCache(model, "int4")
    assert torch.equal(model(ids).logits, before)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
