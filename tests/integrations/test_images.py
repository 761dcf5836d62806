"""Models that read images: their outer part makes masks that look both ways, positions of several kinds, or keys of images."""

from typing import Any

import pytest
import torch
import transformers
from tests.families import BASE, EXPERTS, THETA
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, DynamicCache

from narrowkv import PackedCache, disable, make_default
from narrowkv.errors import UnsupportedModelError

IMAGE, BEGIN, END, SEEN = 90, 91, 92, 4  # tokens that stand for an image, and how many of them
SIGHT = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
PATCHES = {**SIGHT, "patch_size": 7}
QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 32}
SECTIONS = {**BASE, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], **THETA}}
LLAMA = {**BASE, "model_type": "llama"}
GEMMA = {**BASE, "query_pre_attn_scalar": 16, "sliding_window": 12}
PALI = {"image_token_index": IMAGE, "projection_dim": 64}

MODELS: dict[str, dict[str, Any]] = {  # the text's settings, the images', and those of the whole
    "qwen2_5_vl": {"text": SECTIONS, "vision": {**QWEN, "fullatt_block_indexes": [0], "window_size": 56}},
    "qwen3_vl": {"text": SECTIONS, "vision": {**QWEN, "patch_size": 14, "deepstack_visual_indexes": [0]}},
    "llava": {
        "text": LLAMA,
        "vision": {**SIGHT, "model_type": "clip_vision_model", "patch_size": 14, "num_hidden_layers": 2},
        "image_token_index": IMAGE,
    },
    "gemma3": {
        "text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
        "vision": PATCHES,
        "mm_tokens_per_image": SEEN,
        "image_token_index": IMAGE,
    },
    "idefics3": {"text": LLAMA, "vision": PATCHES, "scale_factor": 2},
    "mistral3": {
        "text": {**BASE, "model_type": "mistral"},
        "vision": {**PATCHES, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": IMAGE,
    },
    "llama4": {
        "text": {**BASE, **EXPERTS, "attention_chunk_size": 24, "no_rope_layers": [1, 0], "intermediate_size_mlp": 64},
        "vision": {
            **PATCHES,
            **{"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
        },
        "image_token_index": IMAGE,
    },
    "internvl": {
        "text": {**BASE, "model_type": "qwen2"},
        "vision": {**PATCHES, "image_size": [28, 28], "patch_size": [7, 7]},
        "image_seq_length": SEEN,
    },
    "molmo2": {
        "text": {**BASE, "additional_vocab_size": 8},
        "vision": {**PATCHES, **HEADS, "num_hidden_layers": 2, "image_size": [28, 28]},
        "adapter_config": {
            **{"hidden_size": 32, "intermediate_size": 32, "text_hidden_size": 64, "vision_feature_layer": [1, 0]},
            **{"num_attention_heads": 2, **HEADS},
        },
    },
    "paligemma": {"text": {**BASE, "model_type": "gemma"}, "vision": {**SIGHT, "patch_size": 14}, **PALI},
    "paligemma, gemma2": {"text": {**GEMMA, "model_type": "gemma2"}, "vision": {**SIGHT, "patch_size": 14}, **PALI},
}
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def made(name):
    """A random model whose answers are spread wide."""
    settings, kind = dict(MODELS[name]), name.split(",")[0]
    vision, tokens = settings.pop("vision"), {"vision_start_token_id": BEGIN, "vision_end_token_id": END}
    if kind == "paligemma":
        vision = {**vision, "model_type": "siglip_vision_model"}
    if "image_token_index" not in settings:
        tokens["image_token_id"] = IMAGE
    config = AutoConfig.for_model(kind, text_config=settings.pop("text"), vision_config=vision, **settings, **tokens)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def looked_at(name):
    """A prompt with one image, and what the model is given of it."""
    torch.manual_seed(1)
    ids = torch.randint(2, 80, (1, 40))
    ids[:, 4], ids[:, 5 : 5 + SEEN], ids[:, 5 + SEEN] = BEGIN, IMAGE, END
    kinds, pixels = (ids == IMAGE).long(), torch.randn(1, 3, 28, 28)
    if name.startswith("qwen"):
        patches, grid = torch.randn(4 * SEEN, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 4]])
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    more = {
        "gemma3": {"token_type_ids": kinds},
        "paligemma": {"token_type_ids": 0 * kinds},
        "molmo2": {
            **{"pixel_values": torch.randn(1, 16, 3 * 7 * 7), "image_grids": torch.tensor([[2, 2, 0, 0]])},
            "image_token_pooling": torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
            **{"image_num_crops": torch.tensor([1]), "mm_token_type_ids": kinds},
        },
        "idefics3": {"pixel_values": pixels[:, None]},
        "mistral3": {"image_sizes": torch.tensor([[28, 28]])},
    }
    return {"input_ids": ids, "pixel_values": pixels, **more.get(name.split(",")[0], {})}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_outer_part_makes_the_mask_or_the_positions(name):
    if name not in CONFIG_MAPPING and "," not in name:
        pytest.skip("this version of transformers has no such model")
    if name == "llama4" and transformers.__version__.startswith("5.24."):
        pytest.skip("transformers 5.24 asks its own output for image_outputs, which it lacks")
    model, given = made(name), looked_at(name)
    with torch.inference_mode():
        expected, tokens = model(**given).logits, model.generate(**given, **OPTIONS)
        other = {**given, "pixel_values": torch.randn_like(given["pixel_values"])}
        assert not torch.allclose(model(**other).logits, expected, atol=1e-3)
        cache = PackedCache(model, "fp16")
        assert torch.equal(model(**given).logits, expected)
        torch.testing.assert_close(model(**given, past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(**given, past_key_values=PackedCache(model, "fp16"), **OPTIONS), tokens)
        packed = model.generate(**given, past_key_values=PackedCache(model, "int8"), **OPTIONS)
        assert torch.equal(packed[:, :41], tokens[:, :41])
        make_default(model, "fp16")
        assert torch.equal(model.generate(**given, **OPTIONS), tokens)
        disable(model)


def test_a_second_turn_goes_on_behind_an_image():
    model, given = made("qwen2_5_vl"), looked_at("qwen2_5_vl")
    found = []
    with torch.inference_mode():
        for cache in (DynamicCache(config=model.config), PackedCache(model, "fp16")):
            generated = model.generate(**given, past_key_values=cache, **OPTIONS)
            longer = torch.cat([generated, torch.full_like(generated[:, :5], 7)], dim=1)
            found.append(model.generate(longer, past_key_values=cache, **OPTIONS))
    assert torch.equal(*found)


def test_layers_that_look_at_images_apart_are_refused():
    text = {**BASE, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
    config = AutoConfig.for_model("mllama", text_config=text, vision_config={**vision, "image_size": 28})
    with pytest.raises(UnsupportedModelError, match="Of 3 attention layers 2 keep keys and values"):
        PackedCache(AutoModelForImageTextToText.from_config(config).eval(), "int4")


def test_models_that_do_not_go_from_token_to_token_are_refused():
    if "diffusion_gemma" not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such model")
    layers = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16, "hidden_size_per_layer_input": 8}
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "vocab_size_per_layer_input": 97}
    vision = {**SIGHT, **HEADS, "model_type": "gemma4_vision", "patch_size": 7, "position_embedding_size": 16}
    config = AutoConfig.for_model("diffusion_gemma", text_config={**GEMMA, **layers, **experts}, vision_config=vision)
    with pytest.raises(UnsupportedModelError, match="does not run with a cache of another make"):
        PackedCache(transformers.DiffusionGemmaForBlockDiffusion(config).eval(), "int4")
