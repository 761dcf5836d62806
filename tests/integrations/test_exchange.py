"""What a DynamicCache holds goes into a packed cache and comes out of one, as if the model had read the prompt again."""

import copy
import gc
from itertools import product

import pytest
import torch
from tests.families import make
from tests.integrations.test_serialization import source_of
from transformers import DynamicCache, StaticCache

from narrowkv import PackedCache
from narrowkv.errors import CacheUseError

RECIPES = ["fp16", "nuq3", "kivi-2-g16-r40", "window and sinks", "narrow3", "narrow without outliers", "narrow3-postrope"]
FAMILIES = ["llama", "qwen2", "gemma3_text", "phi", "llama, yarn", "glm"]


def as_trained(model):
    """The model with biases and gains that do something."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, *((-0.5, 0.5) if "bias" in name else (0.5, 1.5)))
    return model


def dense(model, ids, **given):
    """A DynamicCache into which the model has read."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, past_key_values=cache, **given)
    return cache


def packed(model, source, ids, **given):
    cache = PackedCache(model, source)
    with torch.inference_mode():
        model(ids, past_key_values=cache, **given)
    return cache


def spoken(model, cache, ids, **given):
    """Greedy tokens and their logits after `ids`, of which the cache has all but the last."""
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "output_logits": True}
    with torch.inference_mode():
        found = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **options, **given)
    return found.sequences, torch.stack(found.logits)


def assert_alike(found, expected):
    """The same but for codes at a tie, which rounding may decide otherwise."""
    far = (found - expected).abs() > 1e-4 * (1 + expected.abs())
    assert far.float().mean() < 2e-3, far.float().mean()


def left_padded(tokens):
    """Ids of 3 sequences, the mask of their padding, and positions as `generate` counts them."""
    ids, mask = torch.randint(2, 97, (3, tokens)), torch.ones(3, tokens, dtype=torch.int64)
    mask[0, :5], mask[2, :90] = 0, 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize(
    ("family", "name"),
    # of the block that a sliding window cuts, the tokens that never came would have taken some of the budget of exact elements
    [
        (family, name)
        for family, name in product(["llama", "qwen2", "gemma3_text"], RECIPES)
        if family != "gemma3_text" or name not in ("narrow3", "narrow3-postrope")
    ],
)
def test_generation_goes_on_as_from_a_packed_prompt(family, name):
    model = as_trained(make(family))
    source = source_of(model, name)
    ids = torch.randint(2, 97, (2, 151))
    expected = packed(model, source, ids[:, :-1])
    cache = PackedCache.from_cache(model, source, dense(model, ids[:, :-1]))
    assert cache.get_seq_length() == 150
    for ours, theirs in zip(cache.packed, expected.packed, strict=True):
        theirs.evict()
        assert ours.store.first == theirs.store.first
        for one, other in zip(ours.store.read(), theirs.store.read(), strict=True):
            known = ours.store.oldest - ours.store.first
            assert_alike(one[:, :, known:], other[:, :, known:])
    assert cache.elements == expected.elements
    (tokens, logits), (wanted, wanted_logits) = spoken(model, cache, ids), spoken(model, expected, ids)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logits, wanted_logits, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["fp16", "int4", "narrow without outliers"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_left_padded_batches_go_on_by_their_mask(family, name):
    model = as_trained(make(family))
    source = source_of(model, name)
    ids, mask, positions = left_padded(101)
    past = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
    expected = packed(model, source, ids[:, :-1], **past)
    given = dense(model, ids[:, :-1], **past)
    for named in ({"attention_mask": mask[:, :-1]}, past):
        cache = PackedCache.from_cache(model, source, given, **named)
        for ours, theirs in zip(cache.packed, expected.packed, strict=True):
            assert (ours.store.sinks.index is None) == (theirs.store.sinks.index is None)
            if ours.store.sinks.index is not None:
                assert torch.equal(ours.store.sinks.index, theirs.store.sinks.index)
        found = spoken(model, cache, ids, attention_mask=mask)
        wanted = spoken(model, copy.deepcopy(expected), ids, attention_mask=mask)
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converting_to_a_packed_cache_and_back_is_exact(family, dtype):
    model = as_trained(make(family)).to(dtype)
    ids, mask, positions = left_padded(100)
    given = dense(model, ids, attention_mask=mask, position_ids=positions)
    found = PackedCache.from_cache(model, "fp16", given, attention_mask=mask).to_dynamic()
    assert found.get_seq_length() == 100
    for one, other in zip(found.layers, given.layers, strict=True):
        assert type(one) is type(other) and one.keys.dtype == dtype
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert one.get_mask_sizes(1) == other.get_mask_sizes(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_and_unrotating_keys_is_exact_within_rounding(family, dtype):
    model = as_trained(make(family)).to(dtype)
    source = source_of(model, "narrow4")
    window = source.recipe.with_options(
        residual_length=200, search_space=None
    )  # all tokens stay exact, before the rotary embedding
    given = dense(model, torch.randint(2, 97, (2, 100)))
    cache = PackedCache.from_cache(model, copy.copy(source).__class__(**{**vars(source), "recipe": window}), given)
    assert any(layer.rotates_on_read for layer in cache.packed)
    for one, other in zip(cache.to_dynamic().layers, given.layers, strict=True):
        torch.testing.assert_close(
            one.keys, other.keys, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=2 * torch.finfo(dtype).eps
        )


def test_a_dynamic_cache_continues_from_the_stored_tokens():
    model = as_trained(make("gemma3_text"))
    ids = torch.randint(2, 97, (2, 151))
    cache = packed(model, "int8", ids[:, :-1])
    found, logits = spoken(model, cache.to_dynamic(), ids)
    wanted, wanted_logits = spoken(model, cache, ids)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(logits[0], wanted_logits[0], atol=1e-3, rtol=1e-3)  # later tokens are not quantized here


def test_layers_with_a_state_of_their_own_keep_it():
    model = make("qwen3_next")
    ids = torch.randint(2, 97, (2, 71))
    given = dense(model, ids[:, :-1])
    rope_state = copy.deepcopy(given)
    cache = PackedCache.from_cache(model, "fp16", given)
    back = cache.to_dynamic()
    wanted = spoken(model, given, ids)[0]
    for one in (cache, back):
        assert torch.equal(spoken(model, one, ids)[0], wanted)
    assert torch.equal(
        PackedCache.from_cache(model, "fp16", rope_state).to_dynamic().layers[1].keys, rope_state.layers[1].keys
    )


def test_a_cache_that_knows_of_no_windows_is_taken_too():
    model = make("gemma3_text")
    ids = torch.randint(2, 97, (2, 151))
    given = DynamicCache()
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=given)
    cache = PackedCache.from_cache(model, "int4", given)
    expected = packed(model, "int4", ids[:, :-1])
    assert cache.packed[0].store.first == 64 and cache.packed[0].store.missing == 0
    assert torch.equal(spoken(model, cache, ids)[1], spoken(model, expected, ids)[1])


def test_an_empty_dynamic_cache_makes_an_empty_cache(tiny):
    model = tiny()
    cache = PackedCache.from_cache(model, "int4", DynamicCache(config=model.config))
    assert cache.get_seq_length() == 0 and cache.to_dynamic().get_seq_length() == 0


def test_tokens_that_never_came_are_not_gone_back_to(tmp_path):
    model = make("gemma3_text")
    ids = torch.randint(2, 97, (2, 100))
    cache = PackedCache.from_cache(model, "int4", dense(model, ids))
    cache.save(tmp_path / "cache.safetensors", ids)
    loaded = PackedCache.load(tmp_path / "cache.safetensors", model, "int4", token_ids=ids)
    for one in (cache, loaded):
        with pytest.raises(CacheUseError, match="has evicted its first 77 tokens"):
            one.crop(-1)
    more = torch.randint(2, 97, (2, 70))
    with torch.inference_mode():
        found = [model(more, past_key_values=one).logits for one in (cache, loaded)]
    assert torch.equal(*found)
    cache.crop(-1)  # beyond which all that the next token sees came
    assert cache.get_seq_length() == 169


def test_dynamic_caches_that_do_not_fit_are_refused(tiny):
    model, ids = tiny(), torch.randint(2, 97, (2, 40))
    given = dense(model, ids)

    def refused(cause, source="int4", cache=given, to=model, **named):
        with pytest.raises(CacheUseError, match=cause):
            PackedCache.from_cache(to, source, cache, **named)

    refused("A DynamicCache of transformers is wanted, not a StaticCache", cache=StaticCache(model.config, max_cache_len=64))
    refused("not a PackedCache", cache=packed(model, "int4", ids))
    refused("not a tuple", cache=((given.layers[0].keys, given.layers[0].values),))
    refused("has keys .* the model has 2 KV heads of 32; fill one by this model", to=tiny(head_dim=32))
    refused("has 2 layers, the model 1", to=tiny(layers=1))
    refused("Layer 2 of this DynamicCache is no layer of plain keys", to=tiny(layers=3))
    refused(r"An attention mask of integers \[2, 40\]", attention_mask=torch.ones(2, 39, dtype=torch.int64))
    refused("Positions of integers", position_ids=torch.ones(2, 40))
    refused(
        "has evicted tokens that the model's layer sees",
        cache=dense(make("mistral"), torch.randint(2, 97, (2, 40))),
        to=make("llama"),
    )
    short = copy.deepcopy(given)
    short.layers[1].keys, short.layers[1].values = short.layers[1].keys[:, :, 1:], short.layers[1].values[:, :, 1:]
    refused("differ in their sequences or tokens", cache=short)
    dynamic = make("llama, dynamic")
    refused("by angles that a DynamicCache does not keep", source_of(dynamic, "nuq3-1%"), dense(dynamic, ids), dynamic)
    assert PackedCache.from_cache(dynamic, "int4", dense(dynamic, ids)).get_seq_length() == 40


def test_a_cache_whose_model_was_deleted_raises(tiny):
    cache = packed(tiny(), "int4", torch.randint(2, 97, (2, 40)))
    gc.collect()
    with pytest.raises(CacheUseError, match="is gone"):
        cache.to_dynamic()
