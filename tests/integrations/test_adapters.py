"""Models with adapters of PEFT: the cache, the fingerprint and the bias are those of what computes, adapter and all."""

import copy

import pytest
import torch
from transformers import DynamicCache

from narrowkv import PackedCache, calibrate, disable, explain, make_default
from narrowkv.calibration import Fingerprint
from narrowkv.errors import CalibrationError
from narrowkv.integrations.preparation import prepare

peft = pytest.importorskip("peft")
IDS = torch.arange(2 * 80).view(2, 80) * 31 % 95 + 2
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def adapted(model, **options):
    """The model with an adapter on keys and values that has learned something."""
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(copy.deepcopy(model), settings, autocast_adapter_dtype=False).eval()


@pytest.fixture
def biased(tiny):
    model = tiny("qwen2", head_dim=32)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=5.0)
        torch.nn.init.normal_(layer.self_attn.v_proj.bias, std=5.0)
    return model


def test_exact_caches_generate_what_transformers_own_does(biased):
    model = adapted(biased)
    with torch.inference_mode():
        expected = model.generate(IDS, past_key_values=DynamicCache(config=biased.config), **OPTIONS)
        assert not torch.equal(expected, biased.generate(IDS, **OPTIONS))
        assert torch.equal(model.generate(IDS, past_key_values=PackedCache(model, "fp16"), **OPTIONS), expected)
        make_default(model, "fp16")
        found = model.generate(IDS, return_dict_in_generate=True, **OPTIONS)
        assert isinstance(found.past_key_values, PackedCache) and torch.equal(found.sequences, expected)
        disable(model)
        assert torch.equal(model.generate(IDS, **OPTIONS), expected)


@pytest.mark.parametrize("recipe", ["int4", "hadamard-int4", "kivi-4"])
def test_quantized_caches_are_those_of_the_merged_model(recipe, biased):
    model = adapted(biased)
    merged, logits = copy.deepcopy(model).merge_and_unload(), []
    with torch.inference_mode():
        for each in (model, merged):
            cache = PackedCache(each, recipe)
            each(IDS[:, :70], past_key_values=cache)
            logits.append(each(IDS[:, 70:], past_key_values=cache).logits)
            assert "values of 2, and put back" in str(explain(cache))
    torch.testing.assert_close(*logits, atol=2e-2, rtol=2e-2)


def test_a_bias_that_the_adapter_adds_is_found(biased):
    model = adapted(biased, lora_bias=True)
    for name, part in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(part)
    for layer_info in prepare(model).attention:
        for projection, found in (
            (layer_info.module.k_proj, layer_info.constants.keys),
            (layer_info.module.v_proj, layer_info.constants.values),
        ):
            scaling = projection.scaling["default"]
            added = projection.base_layer.bias + scaling * projection.lora_B["default"].bias
            torch.testing.assert_close(found.flatten(), added.detach())


def test_a_calibration_serves_the_model_with_and_without_its_adapter(biased):
    model = adapted(biased)
    ours, wrapped = Fingerprint.of(biased), Fingerprint.of(model)
    assert ours == wrapped
    calibration = calibrate(biased, IDS, "nuq3")
    assert PackedCache(model, calibration).get_seq_length() == 0
    assert PackedCache(biased, calibrate(model, IDS, "nuq3")).get_seq_length() == 0
    with pytest.raises(CalibrationError, match="another model"):  # whose weights are others
        PackedCache(model.merge_and_unload(), calibration)


def test_a_calibration_serves_weights_in_few_bits_below_an_adapter(biased):
    calibration, few = calibrate(biased, IDS, "nuq3"), copy.deepcopy(biased)
    few.narrowkv_few_bits = True
    for part in few.model.layers.parameters():  # 4 bits for each row, as QLoRA has them once they are dequantized
        scale = part.data.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7
        part.data = (part.data / scale).round() * scale
    model = adapted(few)
    assert PackedCache(model, calibration).get_seq_length() == 0
    other = adapted(few)
    for part in other.base_model.model.model.layers.parameters():
        torch.nn.init.normal_(part)
    with pytest.raises(CalibrationError, match="another model"):
        PackedCache(other, calibration)
