import pytest
import torch
from tests.families import BASE, DENSE, REFUSED, THETA, WINDOW, make
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from narrowkv import PackedCache
from narrowkv.attention import Rope, StoredRope
from narrowkv.errors import UnsupportedModelError
from narrowkv.integrations.preparation import prepare


def llama(**extra):
    settings = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **extra}))


@pytest.mark.parametrize(
    ("make_model", "cause"),
    [
        (lambda: llama(hidden_size=24, num_attention_heads=2), "head_dim of 12"),
        (lambda: llama(head_dim=520), "head_dim of 520"),
        *((lambda name=name: make(name), cause) for name, (_, cause) in REFUSED.items()),
        *((lambda name=name: make(name), "choose backend 'dense'") for name in DENSE),
    ],
    ids=["odd head_dim", "large head_dim", *REFUSED, *DENSE],
)
def test_unsupported_models_are_refused_when_the_cache_is_made_and_left_unchanged(make_model, cause):
    model = make_model().eval()
    before, ids = model.config._attn_implementation, torch.randint(2, 20, (1, 9))
    with torch.inference_mode():
        expected = model(ids).logits
        with pytest.raises(UnsupportedModelError, match=cause):
            PackedCache(model, "int4")
        assert model.config._attn_implementation == before
        assert torch.equal(model(ids).logits, expected)


def test_another_attention_is_refused_without_running_it():
    model = llama(attn_implementation="flex_attention").eval()
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        PackedCache(model, "int4")
    assert model.config._attn_implementation == "flex_attention"


def rope_of(name):
    return [layer.rope for layer in prepare(make(name)).attention]


def test_attention_layers_found_by_the_probe():
    assert [rope.interleaved for rope in rope_of("llama")] == [False, False]
    assert [rope.interleaved for rope in rope_of("cohere")] == [True, True]
    assert [2 * len(rope.inverse_frequencies) for rope in rope_of("phi")] == [8, 8]  # half of head_dim 16
    assert rope_of("gpt2") == [None, None]
    assert [rope is None for rope in rope_of("smollm3")] == [False, True]
    local, whole = rope_of("gemma3_text")  # each kind of layer has frequencies of its own
    assert not torch.equal(local.inverse_frequencies, whole.inverse_frequencies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_rotary_embeddings_are_recognized_in_every_dtype(dtype):
    for parameters in (
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ):
        model = llama(rope_parameters={**parameters, "rope_theta": 1e4}, initializer_range=0.4).to(dtype).eval()
        (layer,) = prepare(model).attention
        assert isinstance(layer.rope, Rope)
        torch.testing.assert_close(layer.rope.inverse_frequencies, model.model.rotary_emb.inv_freq.float())
        assert layer.rope.scaling == model.model.rotary_emb.attention_scaling


def test_changing_rotary_frequencies_are_stored_per_token():
    for name in ("llama, dynamic", "llama, longrope", "qwen2_5_vl", "llama4_text"):
        rope = rope_of(name)[0]
        assert isinstance(rope, StoredRope) and rope.record == "angles0"


def test_layers_without_attention_and_layers_that_share_keys():
    assert [layer.layer for layer in prepare(make("lfm2")).attention] == [1]
    shared = prepare(make("gemma4_text"))
    assert [layer.layer for layer in shared.attention] == [0, 1]
    assert [module.layer_idx for module in shared.readers] == [2, 3]
    assert [layer.head_dim for layer in shared.attention] == [16, 24]


def test_probing_leaves_no_trace_and_happens_once(tiny, monkeypatch):
    model = tiny().train()
    prepare(model)
    assert model.training
    monkeypatch.setattr("narrowkv.integrations.preparation.probe", None)
    PackedCache(model, "int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embeddings_that_differ_in_slow_frequencies_only_are_told_apart(dtype):
    """At the probe's few positions their keys are alike to a thousandth; each layer must still get its own."""
    config = AutoConfig.for_model(
        "olmo3",
        **{**BASE, **WINDOW, "head_dim": 64, "layer_types": ["sliding_attention", "full_attention"]},
        rope_parameters={
            "sliding_attention": {"rope_type": "default", **THETA},
            "full_attention": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                **THETA,
                "original_max_position_embeddings": 8192,
            },
        },
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    rotary = model.model.rotary_emb
    for layer, kind in zip(prepare(model).attention, config.layer_types, strict=True):
        torch.testing.assert_close(layer.rope.inverse_frequencies, getattr(rotary, f"{kind}_inv_freq").float())


def test_a_model_in_training_mode_is_served_and_left_module_by_module_as_it_was(tiny):
    model = tiny("qwen2", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    PackedCache(model, "int4")
    assert [module.training for module in model.modules()] == modes
