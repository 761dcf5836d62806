import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from narrowkv import PackedCache
from narrowkv.errors import UnsupportedModelError


def llama(**extra):
    settings = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **extra}))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=30)), "type 'gpt2'"),
        (lambda: llama(hidden_size=24, num_attention_heads=2), "head_dim of 12"),
        (lambda: llama(head_dim=520), "head_dim of 520"),
        (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "type 'dynamic'",
        ),
        (lambda: llama(attn_implementation="flex_attention"), "flex_attention"),
    ],
    ids=["family", "odd head_dim", "large head_dim", "rope", "attention"],
)
def test_what_is_not_supported_is_refused_when_the_cache_is_made(make, cause):
    with pytest.raises(UnsupportedModelError, match=cause):
        PackedCache(make(), "int4")


def test_scaled_rotary_embeddings():
    for parameters in (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ):
        model = llama(rope_parameters={**parameters, "rope_theta": 1e4}, initializer_range=0.4).eval()
        ids = torch.randint(2, 30, (1, 100))
        cache = PackedCache(model, "int8", strict=True)
        with torch.inference_mode():
            expected, found = model(ids).logits, model(ids, past_key_values=cache).logits
        assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
