"""Models whose projections add a bias to keys and values: the probe finds it, caches take it out of what they quantize."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.conftest import make_tiny
from tests.families import BASE, make
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from narrowkv import PackedCache, calibrate, explain, get_recipe
from narrowkv.calibration.fit import smoothing
from narrowkv.errors import CacheUseError, CalibrationError
from narrowkv.integrations import projections
from narrowkv.integrations.preparation import prepare

SLOW = [12, 13, 14, 15, 28, 29, 30, 31]  # channels of head_dim 32 that hardly rotate, while the first rotates fastest
ROPE = {"rope_type": "default", "rope_theta": 1e6}


def biased(*, dtype=torch.float32, **options):
    """A tiny Qwen2 with keys as its real ones have them: a few channels a hundred times as large as the others."""
    model = make_tiny("qwen2", head_dim=32, rope_parameters=ROPE, **options)
    for layer in model.model.layers:
        attention = layer.self_attn
        nn.init.normal_(attention.k_proj.bias)
        nn.init.normal_(attention.v_proj.bias, std=20.0)
        attention.k_proj.bias.data.view(-1, 32)[:, [*SLOW, 0]] *= 60
    return model.to(dtype)


def without_removal(name):
    recipe = get_recipe(name)
    return replace(
        recipe, keys=recipe.keys.with_settings(remove_bias=False), values=recipe.values.with_settings(remove_bias=False)
    )


IDS = torch.randint(2, 97, (2, 200), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :13] = 0
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)


@torch.inference_mode()
def logits(model, cache, chunks=(150, 3, 1, 46)):
    found, at = [], 0
    for count in chunks:
        here = slice(at, at + count)
        options = {"attention_mask": MASK[:, : at + count], "position_ids": POSITIONS[:, here], "past_key_values": cache}
        found.append(model(IDS[:, here], **options).logits)
        at += count
    return torch.cat(found, 1)


def loss(model, cache, chunks=(150, 3, 1, 46)):
    """Mean KL divergence from the model without a cache of ours, over tokens that have a packed past."""
    exact, found = (x[:, 150:].log_softmax(-1) for x in (logits(model, None, (200,)), logits(model, cache, chunks)))
    return (exact.exp() * (exact - found)).sum(-1).mean()


def test_the_bias_is_what_the_projections_give_for_nothing():
    model = biased()
    for layer_info, layer in zip(prepare(model).attention, model.model.layers, strict=True):
        known, projections = layer_info.constants, (layer.self_attn.k_proj, layer.self_attn.v_proj)
        for found, projection in zip((known.keys, known.values), projections, strict=True):
            torch.testing.assert_close(found.flatten(), projection.bias.data)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "opt", "phi", "starcoder2", "qwen2_5_vl"])
def test_fused_and_other_projections_and_embeddings_need_no_names(name):
    model = make(name).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter)
    known = [layer_info.constants for layer_info in prepare(model).attention]
    assert all(part is not None and part.any() for one in known for part in (one.keys, one.values))


def test_no_bias_is_found_where_it_is_zero_or_a_norm_follows():
    assert [layer_info.constants.keys for layer_info in prepare(make_tiny("qwen2")).attention] == [None, None]
    config = AutoConfig.for_model("qwen3", **BASE, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias)
        nn.init.normal_(layer.self_attn.v_proj.bias)
        nn.init.uniform_(layer.self_attn.k_norm.weight, 0.5, 2.0)
    for layer_info in prepare(model).attention:
        assert layer_info.constants.keys is None and layer_info.constants.values is not None
        torch.testing.assert_close(
            layer_info.constants.gain, layer_info.module.k_norm.weight.data.expand(2, -1), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("backend", ["auto", "torch", "naive"])
@pytest.mark.parametrize("name", ["int4", "hadamard-int4"])
def test_codes_of_a_token_lose_a_fraction(name, backend):
    model = biased()
    cache = PackedCache(model, name, backend=backend)
    lost = loss(model, cache)
    assert backend != "auto" or cache.backend.startswith("cpu")
    assert lost < 0.3 * loss(model, PackedCache(model, without_removal(name), backend=backend))


@pytest.mark.parametrize("name", ["int4", "hadamard-int4", "nvfp4", "kivi-4", "fp8", "nf4", "intrinsic-2-nearest"])
def test_all_backends_agree_however_the_text_is_cut(name):
    model = biased(layers=1)
    expected = logits(model, PackedCache(model, name, backend="naive"))
    for backend in ("auto", "torch"):
        torch.testing.assert_close(logits(model, PackedCache(model, name, backend=backend)), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_elements_are_those_of_the_model(dtype):
    model = biased(dtype=dtype, layers=1)
    assert torch.equal(logits(model, PackedCache(model, "fp16")), logits(model, PackedCache(model, without_removal("fp16"))))
    cache = PackedCache(model, get_recipe("int4").with_options(residual_length=300))
    with_ours, exact = logits(model, cache, (200,)), logits(model, None, (200,))
    assert torch.equal(with_ours, exact)
    other = PackedCache(model, without_removal("int4").with_options(residual_length=300))
    logits(model, other, (200,))
    for found, own in zip(cache.packed[0].store.residual.stored(), other.packed[0].store.residual.stored(), strict=True):
        assert torch.equal(found, own)


def test_keys_stored_before_rope_are_fake_quantized_before_rope():
    model, recipe = biased(), get_recipe("int4")
    unrotated = replace(recipe, keys=recipe.keys.with_settings(pre_rope=True))
    cache = PackedCache(model, unrotated)
    assert cache.backend == "torch" and cache.packed[0].store.bias.rope is None
    off = without_removal("int4")
    assert loss(model, cache) < 0.3 * loss(model, PackedCache(model, replace(off, keys=off.keys.with_settings(pre_rope=True))))


def test_static_ranges_take_a_constant_in_themselves():
    model = biased(layers=1)
    cache = PackedCache(model, calibrate(model, IDS, "int4-channel"))
    assert cache.packed[0].store.bias.keys is None and cache.packed[0].store.bias.values is not None


@pytest.mark.parametrize("name", ["smooth-int4", "nuq4-1%"])
def test_calibration_learns_from_the_quantized_elements(name):
    model, plain = biased(layers=1), make_tiny("qwen2", head_dim=32, rope_parameters=ROPE, layers=1)
    learned, off = (calibrate(model, IDS, recipe) for recipe in (name, without_removal(name)))
    keys, values = learned.layers[0]
    if name == "smooth-int4":  # slow channels are not larger than others once their bias is gone
        assert keys.smooth[:, 15].mean() < 1.5 < off.layers[0][0].smooth[:, 15].mean()  # 1 is the mean
    else:
        torch.testing.assert_close(values.codebook, calibrate(plain, IDS, name).layers[0][1].codebook, rtol=0, atol=0.5)
    assert loss(model, PackedCache(model, learned)) < loss(model, PackedCache(model, off))


def test_a_saved_cache_goes_on_and_another_bias_is_refused(tmp_path):
    model = biased()
    cache = PackedCache(model, "int4")
    logits(model, cache, (150,))
    cache.save(tmp_path / "cache")
    loaded, twin = PackedCache.load(tmp_path / "cache", model, "int4"), copy.deepcopy(cache)
    rest = {"input_ids": IDS[:, 150:], "attention_mask": MASK, "position_ids": POSITIONS[:, 150:]}
    with torch.inference_mode():
        found = [model(past_key_values=one, **rest).logits for one in (cache, loaded, twin)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    other = biased()
    other.model.layers[0].self_attn.v_proj.bias.data += 1
    with pytest.raises(CalibrationError, match="another bias"):
        PackedCache.load(tmp_path / "cache", other, "int4")


def test_beams_cropped_text_and_assisted_decoding_go_on():
    model, ids = biased(), IDS[1:, :100]

    def ours(backend="auto", **more):
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **more}
        with torch.inference_mode():
            return model.generate(ids, past_key_values=PackedCache(model, "int8", backend=backend), **options)

    assert torch.equal(ours(num_beams=3), ours("naive", num_beams=3))
    assert torch.equal(ours(prompt_lookup_num_tokens=4), ours())


def test_bytes_of_the_removed_bias_are_counted_and_reported():
    model = biased(layers=1)
    caches = [PackedCache(model, recipe) for recipe in ("int4", without_removal("int4"))]
    for cache in caches:
        logits(model, cache, (200,))
    tables = 4 * 2 * 2 * 32  # of keys and of values, float32
    positions = caches[0].position_buffers["positions"].tensors()[0].nbytes
    assert caches[0].nbytes == caches[1].nbytes + tables + positions
    assert explain(caches[0]).layers[0]["bias"] == tables
    assert "bias of the projections is taken out of the keys of 1 layer and the values of 1" in str(explain(caches[0]))
    assert "bias of the projections" not in str(explain(caches[1]))
    with pytest.raises(CacheUseError, match="Expected a PackedCache, not a Qwen2ForCausalLM"):
        explain(model)


def test_a_refused_token_leaves_no_trace():
    model = biased(layers=1)
    cache = PackedCache(model, "int4")
    logits(model, cache, (150,))
    before = model.model.embed_tokens.weight[5].clone()
    model.model.embed_tokens.weight.data[5] = float("nan")
    with torch.no_grad(), pytest.raises(ValueError, match="NaN"):
        model(torch.full((2, 1), 5), past_key_values=cache)
    model.model.embed_tokens.weight.data[5] = before
    assert cache.position_buffers["positions"].length == cache.length == 150


def normed(**options):
    """A tiny Qwen3 whose norm of keys has a gain that differs from pair to pair, as that of real models does."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **BASE | {"head_dim": 32}, **options)).eval()
    for layer in model.model.layers:
        gains = torch.logspace(-0.5, 1, 16).repeat(2)
        layer.self_attn.k_norm.weight.data = gains * torch.empty(32).uniform_(0.8, 1.2)
        layer.self_attn.q_norm.weight.data = 0.3 / gains
    return model


def without_gain(name):
    recipe = get_recipe(name)
    return replace(recipe, keys=recipe.keys.with_settings(fold_gain=False))


@pytest.mark.parametrize("name", ["int4", "hadamard-int4", "nvfp4"])
def test_the_gain_of_a_norm_is_folded_into_the_query(name):
    model = normed()
    cache = PackedCache(model, name)
    gain = model.model.layers[0].self_attn.k_norm.weight.data.expand(2, -1)
    quantizer = cache.packed[0].store.quantizers[0]
    torch.testing.assert_close(quantizer.smooth, smoothing(gain, projections.GAIN_POWER))
    elements = torch.randn(2, 2, 70, 32)
    assert torch.equal(quantizer.encode(elements).codes, quantizer.encode_naive(elements).codes)
    expected = logits(model, PackedCache(model, name, backend="naive"))
    torch.testing.assert_close(logits(model, cache), expected, rtol=0, atol=2e-2)
    assert loss(model, PackedCache(model, name)) < 0.7 * loss(model, PackedCache(model, without_gain(name)))
    assert "gain of a norm is folded into the query in 2 layers" in str(explain(cache))


def test_no_gain_is_folded_for_channel_ranges_or_unit_gain():
    for model, recipe in ((normed(), "kivi-4"), (normed(), without_gain("int4")), (make("qwen3"), "int4")):
        cache = PackedCache(model.eval(), recipe)
        assert cache.packed[0].store.quantizers[0].smooth is None
        assert "gain" not in str(explain(cache))


def test_a_saved_cache_with_a_gain_goes_on(tmp_path):
    model = normed()
    cache = PackedCache(model, "int4")
    logits(model, cache, (150,))
    cache.save(tmp_path / "cache")
    rest = {"input_ids": IDS[:, 150:], "attention_mask": MASK, "position_ids": POSITIONS[:, 150:]}
    with torch.inference_mode():
        loaded = PackedCache.load(tmp_path / "cache", model, "int4")
        assert torch.equal(*(model(past_key_values=one, **rest).logits for one in (cache, loaded)))
