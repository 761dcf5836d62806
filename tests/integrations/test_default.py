"""The packed cache without a change at the call."""

import copy

import pytest
import torch
from tests.conftest import asset
from tests.families import BASE
from transformers import AutoConfig, Blip2ForConditionalGeneration, DynamicCache, pipeline

from narrowkv import PackedCache, disable, enable, make_default
from narrowkv.errors import RecipeError, UnsupportedModelError


def generate(model, ids, **options):
    with torch.inference_mode():
        return model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **options)


def test_generate_uses_a_new_packed_cache_at_every_call(tiny):
    model, ids = tiny(), torch.randint(2, 97, (2, 30))
    expected = generate(model, ids)
    make_default(model, "fp16")
    for _ in range(2):
        found = generate(model, ids)
        assert isinstance(found.past_key_values, PackedCache)
        assert torch.equal(found.sequences, expected.sequences)
        assert found.past_key_values.get_seq_length() == 49
    assert isinstance(generate(model, ids, past_key_values=DynamicCache()).past_key_values, DynamicCache)
    assert generate(model, ids, num_beams=2).past_key_values.batch_size == 4
    make_default(model, "int4")
    assert generate(model, ids).past_key_values.recipe.name == "int4"
    disable(model)
    after = generate(model, ids)
    assert isinstance(after.past_key_values, DynamicCache)
    assert torch.equal(after.sequences, expected.sequences)


def test_disable_restores_the_model(tiny):
    model = tiny(attn_implementation="eager")
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    enable(model)
    make_default(model, "int4", scoring=True)
    disable(model)
    assert model.config._attn_implementation == "eager"
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_pre_hooks for module in model.modules())
    enable(model)
    ids = torch.randint(2, 97, (1, 9))
    assert torch.equal(
        generate(model, ids, past_key_values=PackedCache(model, "fp16")).sequences, generate(model, ids).sequences
    )


def test_scoring_without_a_cache_sees_quantized_elements(tiny):
    model, ids = tiny(), torch.randint(2, 97, (2, 60))
    with torch.inference_mode():
        plain = model(ids).logits
        expected = model(ids, past_key_values=PackedCache(model, "int3", strict=True)).logits
        make_default(model, "int3")
        assert torch.equal(model(ids).logits, plain)
        make_default(model, "int3", scoring=True)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected)
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    model(ids, labels=ids).loss.backward()  # with gradients the model is its own
    assert model.lm_head.weight.grad is not None
    disable(model)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain)


def test_pipelines_need_no_change(tiny):
    speak = pipeline("text-generation", model=str(asset("models", "stories260K")))
    options = {"max_new_tokens": 30, "do_sample": False, "return_full_text": False}
    expected = speak("Once upon a time", **options)
    make_default(speak.model, "fp16")
    assert speak("Once upon a time", **options) == expected


def test_unsupported_defaults_are_refused_at_once(tiny):
    with pytest.raises(RecipeError, match="narrowkv calibrate"):
        make_default(tiny(), "nuq3-1%")
    with pytest.raises(UnsupportedModelError):
        enable(tiny(attn_implementation="flex_attention"))


def test_changes_by_the_caller_are_restored_afterwards(tiny):
    model = tiny()
    own = {name: (lambda *args, **kwargs: None) for name in ("prepare_inputs_for_generation", "_prepare_cache_for_generation")}
    vars(model).update(own)
    make_default(model, "int4")
    disable(model)
    assert all(vars(model)[name] is function for name, function in own.items())


def test_a_copy_of_the_model_makes_caches_for_itself(tiny):
    model, ids = tiny(), torch.randint(2, 97, (1, 30))
    make_default(model, "int4", scoring=True)
    twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, ids).sequences, generate(model, ids).sequences)
    with torch.inference_mode():
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_a_cache_passed_as_a_positional_argument_is_used(tiny):
    model, ids = tiny(), torch.randint(2, 97, (1, 30))
    make_default(model, "int4", scoring=True)
    cache = DynamicCache()
    with torch.inference_mode():
        model(ids, None, None, cache)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("wish", ["static", "dynamic", "quantized"])
def test_an_explicit_cache_implementation_overrides_the_default(tiny, wish):
    model, ids = tiny(), torch.randint(2, 97, (1, 30))
    make_default(model, "int4")
    if wish == "quantized":
        with pytest.raises(ImportError, match="quanto"):  # transformers' own words, where its package is missing
            generate(model, ids, cache_implementation=wish)
        return
    assert not isinstance(generate(model, ids, cache_implementation=wish).past_key_values, PackedCache)
    model.generation_config.cache_implementation = wish
    assert not isinstance(generate(model, ids).past_key_values, PackedCache)


def test_a_model_that_does_not_generate_is_refused_untouched(tiny):
    model = tiny()
    with pytest.raises(UnsupportedModelError, match="LlamaModel does not generate"):
        make_default(model.model, "int4")
    assert "narrowkv_hold" not in vars(model.model)


def test_a_model_that_generates_by_an_inner_one():
    sight = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**BASE, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 64}
    config = AutoConfig.for_model(
        "blip-2",
        vision_config={**sight, "image_size": 28, "patch_size": 14},
        qformer_config={**sight, "encoder_hidden_size": 32},
        text_config=text,
        num_query_tokens=4,
        image_token_index=90,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((1, 4), 90), torch.randint(2, 80, (1, 10))], dim=1)
    options = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), "return_dict_in_generate": True}
    options |= {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**options)
    make_default(model, "fp16")
    found = model.generate(**options)
    assert isinstance(found.past_key_values, PackedCache) and torch.equal(found.sequences, expected.sequences)
    disable(model)
    assert isinstance(model.generate(**options).past_key_values, DynamicCache)


def test_generate_batch_is_refused_until_the_default_is_removed(tiny):
    """Its paged cache would not be packed, and nothing would say so."""
    model = tiny()
    make_default(model, "int4")
    with pytest.raises(UnsupportedModelError, match="CacheGroup"):
        model.generate_batch([[3, 4, 5]])
    disable(model)
    assert "init_continuous_batching" not in vars(model)
