"""Tiny random models of many architectures."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
GEMMA = {**WINDOW, "query_pre_attn_scalar": 16}

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
}
# what cannot be served, and the words with which it is refused
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptj": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "attention by itself"),
    "codegen": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "attention by itself"),
    "bloom": ({"n_head": 4}, "not told the positions"),
    "llama4_text": (EXPERTS, "rotates its keys"),
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
}


def make(name: str) -> PreTrainedModel:
    """A random model of two layers in evaluation mode, its logits spread wide."""
    torch.manual_seed(0)
    extra = dict(REFUSED[name][0] if name in REFUSED else FAMILIES[name])
    implementation = extra.pop("attn_implementation", None)
    config = AutoConfig.for_model(name, **{**BASE, **extra})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float().eval()
