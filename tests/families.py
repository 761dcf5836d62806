"""Tiny random models of many architectures."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from narrowkv import PackedCache

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
WINDOW = {"sliding_window": 24}
THETA = {"rope_theta": 1e4}
SCALED = {**THETA, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 48,
    **THETA,
}
GEMMA = {**WINDOW, "query_pre_attn_scalar": 16}

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "padded": {},
    "beam": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 10},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {},
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "gemma": {},
    "gemma2": {**GEMMA, "attn_implementation": "eager"},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "vaultgemma": {**GEMMA, "attn_implementation": "eager"},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 512},
    "phimoe": EXPERTS,
    "gpt_oss": {**EXPERTS, **WINDOW, "layer_types": ["sliding_attention", "full_attention"], "attn_implementation": "eager"},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS,
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "cohere": {},
    "cohere2": WINDOW,
    "stablelm": {},
    "starcoder2": {},
    "granite": {},
    "granitemoe": EXPERTS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "exaone4": WINDOW,
    "ernie4_5": {},
    "seed_oss": {},
    "hunyuan_v1_dense": {},
    "apertus": {},
    "nemotron": {},
    "persimmon": {},
    "arcee": {},
    "helium": {},
    "minimax_m2": EXPERTS,
    "dots1": EXPERTS,
    "bitnet": {},
    "ministral3": {},
    "llama4_text": {**EXPERTS, "attention_chunk_size": 24, "no_rope_layers": [1, 0], "intermediate_size_mlp": 64},
    "gemma4_text": {
        **GEMMA,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
    },
    "qwen3_next": {
        **EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "conv_L_cache": 3},
    "llama, linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}},
    "llama, llama3": {
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}
    },
    "llama, yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **SCALED}},
    "llama, dynamic": {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **THETA}},
    "llama, longrope": {"rope_parameters": LONG, "max_position_embeddings": 128},
    "phi3, longrope": {
        "sliding_window": None,
        "original_max_position_embeddings": 48,
        "max_position_embeddings": 192,
        "rope_parameters": LONG,
    },
    "qwen2_5_vl": {
        "vision": {"depth": 1, "hidden_size": 32, "out_hidden_size": 64},
        "text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], **THETA}},
    },
    "qwen3_vl": {
        "vision": {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "deepstack_visual_indexes": []},
        "text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], **THETA}},
    },
    "gemma3": {
        "vision": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
        "text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    },
}
# what computes attention by itself and is served by the dense path, chosen by name
DENSE: dict[str, dict[str, Any]] = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": ...},
    "mpt": {"use_cache": True, "d_model": 64, "n_heads": 4, "n_layers": 2},
    "bloom": {"n_head": 4},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "jetmoe": {**EXPERTS, "kv_channels": 16},
    "diffllama": {},
}
# what cannot be served, and the words with which it is refused
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v3": (
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
        },
        "different sizes",
    ),
    "mamba": ({}, "no attention layers"),
    "falcon_h1": ({}, "cannot be packed"),
}


def make(name: str) -> PreTrainedModel:
    """A random model of few layers in evaluation mode, its logits spread wide."""
    torch.manual_seed(0)
    extra = dict(REFUSED[name][0] if name in REFUSED else (FAMILIES | DENSE)[name])
    implementation = extra.pop("attn_implementation", None)
    kind = name.split(",")[0]
    if "text" in extra:
        config = AutoConfig.for_model(kind, text_config={**BASE, **extra["text"]}, vision_config=extra["vision"])
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=implementation)
    else:
        settings = {name: value for name, value in {**BASE, **extra}.items() if value is not ...}
        config = AutoConfig.for_model(kind, **settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.float().eval()


def prompt(mode: str, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask: three rows with very different left padding, or one row."""
    torch.manual_seed(1)
    ids = torch.randint(2, 9 if mode == "prompt lookup" else 97, (3, tokens))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[2, : tokens - 7] = 0
    return (ids, mask) if mode in ("padded", "beam") else (ids[:1], mask[1:2])


def generate(model: Any, mode: str, cache: Any, tokens: int = 60, **options: Any) -> torch.Tensor:
    """24 tokens after the mode's prompt."""
    ids, mask = prompt(mode, tokens)
    with torch.inference_mode():
        settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **MODES[mode], **options}
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)


def compare_modes(family: str) -> dict[str, bool | None]:
    """By mode, whether the exact recipe gives the tokens of DynamicCache; None where transformers cannot do that itself."""
    # two models, since some rotary embeddings remember the longest sequence they have seen
    plain, ours = make(family), make(family)
    backend = "dense" if family in DENSE else "torch"
    found: dict[str, bool | None] = {}
    for mode in MODES:
        try:
            expected = generate(plain, mode, DynamicCache(config=plain.config))
        except (ValueError, RuntimeError):
            found[mode] = None
            continue
        found[mode] = torch.equal(generate(ours, mode, PackedCache(ours, "fp16", backend=backend)), expected)
    return found
