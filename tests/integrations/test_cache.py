import copy

import pytest
import torch
from tests.families import make

from narrowkv import PackedCache, Quantization, Recipe, Scheme, Transform, get_recipe
from narrowkv.errors import ActivationError, CacheUseError, RecipeError, UnsupportedModelError

UNROTATED = Recipe(
    "unrotated", keys=Scheme(Quantization(4, "int"), Transform(pre_rope=True)), values=Scheme(Quantization(4, "int"))
)


def run(model, cache, tokens=130, batch=1):
    with torch.inference_mode():
        return model(torch.randint(2, 97, (batch, tokens)), past_key_values=cache).logits


def test_nbytes_is_the_sum_over_real_tensors(tiny):
    model = tiny()
    cache = PackedCache(model, get_recipe("int4").with_options(sinks=2, residual_length=8))
    run(model, cache, tokens=200, batch=3)
    elements = 2 * 2 * 3 * 2 * 16 * 200  # sides, layers, batch, kv_heads, head_dim, tokens
    assert cache.elements == elements
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
    assert cache.bits_per_element == 8 * cache.nbytes / elements


@pytest.mark.parametrize(("family", "embeddings"), [("llama", 1), ("gemma3_text", 2)])
def test_layers_whose_keys_rotate_alike_share_their_embedding(family, embeddings):
    model = make(family)
    cache = PackedCache(model, UNROTATED)
    run(model, cache)
    for one in (cache, copy.deepcopy(cache)):
        assert len(one.packed) == 2 and len({id(layer.rope) for layer in one.packed}) == embeddings


def test_an_empty_cache_counts_its_tables(tiny):
    cache = PackedCache(tiny(), "int4")
    assert cache.nbytes == 2 * 2 * (16 + 15) * 4
    assert cache.batch_size == -1
    assert cache.bits_per_element != cache.bits_per_element  # nan


def test_repr_and_backend_of_a_cache(tiny):
    model = tiny()
    cache = PackedCache(model, "int4")
    run(model, cache, 70)
    assert repr(cache).startswith("PackedCache(int4, 70 tokens x 1, ")
    assert cache.backend in ("cpu (avx512)", "cpu (avx2)", "cpu (generic)")
    assert PackedCache(model, "int4", backend="torch").backend == "torch"
    assert PackedCache(model, "hadamard-int4").backend.endswith("), keys and values encoded in torch")
    assert "torch" not in PackedCache(model, "fp16", backend="cpu").backend
    assert PackedCache(model, "nvfp4").backend == "torch"  # which the compiled kernel does not read
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
        rope_state = weight[3].clone()
        weight[3] = float("nan")
        with pytest.raises(ActivationError, match="NaN"):
            run(model, cache)
        weight[3] = rope_state
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


def test_attention_exchanged_after_preparation_is_detected(tiny):
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


def test_a_refused_call_stores_nothing(tiny):
    model, recipe = tiny(), get_recipe("int4").with_options(sinks=2)
    cache, ids = PackedCache(model, recipe), torch.randint(2, 97, (1, 20))
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data *= 1e7
    with pytest.raises(ActivationError):
        model(ids, past_key_values=cache)
    weight.data /= 1e7
    with torch.inference_mode():
        found, expected = (model(ids[:, :9], past_key_values=one).logits for one in (cache, PackedCache(model, recipe)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("family", "backend"), [("lfm2", "torch"), ("gptj", "dense")])
def test_a_call_that_failed_half_way_is_noticed_whatever_the_layers(family, backend):
    model, ids = make(family), torch.randint(2, 97, (1, 20))
    cache, name = PackedCache(model, "int4", backend=backend), "v_proj.weight"
    last = [part for key, part in model.named_parameters() if key.endswith(name)][-1]
    good = last.data.clone()
    last.data[0] = float("nan")
    with pytest.raises(ActivationError):
        model(ids, past_key_values=cache)
    last.data = good
    with pytest.raises(CacheUseError, match="failed half-way"):
        model(ids, past_key_values=cache)
    cache.reset()
    with torch.inference_mode():
        fresh = PackedCache(model, "int4", backend=backend)
        found, expected = (model(ids[:1], past_key_values=one).logits for one in (cache, fresh))
    torch.testing.assert_close(found, expected)


def test_a_hybrid_crops_wholly_or_not_at_all_and_may_change_its_batch_after_a_reset():
    model, ids = make("lfm2"), torch.randint(2, 97, (3, 10))
    cache = PackedCache(model, "fp16")
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        with pytest.raises(CacheUseError, match="cannot be cropped"):
            cache.crop(-3)
        assert cache.length == 10
        cache.reset()
        found, expected = (model(ids[:1], past_key_values=one).logits for one in (cache, PackedCache(model, "fp16")))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_cropped_to_nothing_may_change_its_batch(family):
    model = make(family)
    cache = PackedCache(model, UNROTATED)
    with torch.inference_mode():
        for tokens in (200, 1):
            model(torch.randint(2, 97, (3, tokens)), past_key_values=cache)
        cache.crop(-201)
        model(torch.randint(2, 97, (1, 9)), past_key_values=cache)
    assert cache.length == 9 and cache.batch_size == 1


def test_positions_are_stored_as_long_as_a_layer_needs_them():
    model = make("mistral")
    cache = PackedCache(model, UNROTATED)
    with torch.inference_mode():
        for tokens in (900, *[1] * 70):
            model(torch.randint(2, 97, (1, tokens)), past_key_values=cache)
    assert sum(tensor.nbytes for tensor in cache.position_buffers["positions"].tensors()) < 4 * 300


def test_attention_weights_are_not_promised(tiny):
    model = tiny(attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match="attention weights"):
        model(torch.randint(2, 97, (1, 9)), past_key_values=PackedCache(model, "int4"), output_attentions=True)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_empty_batch_is_refused_and_leaves_the_cache_as_it_was(tiny, call):
    model, nobody = tiny(), torch.zeros(0, 5, dtype=torch.long)
    cache = PackedCache(model, "int4")
    with pytest.raises(CacheUseError, match="batch is empty"):
        getattr(model, call)(nobody, past_key_values=cache)
    model(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
    assert cache.length == 5
