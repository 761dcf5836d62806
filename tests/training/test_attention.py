"""Gradients of a model that is quantized as it runs, against a Llama model written again in plain torch."""

import contextlib
import copy
import math

import pytest
import torch
from tests.families import make
from transformers import DynamicCache

from narrowkv import PackedCache, calibrate, get_recipe
from narrowkv.errors import ActivationError, CacheUseError, CalibrationError, TrainingError, UnsupportedModelError
from narrowkv.training import quantized_attention

TOKENS = torch.arange(3 * 150).view(3, 150) * 31 % 95 + 2
RECIPES = [
    *("fp16", "int4", "int2-head", "int3-channel", "nf3", "fp8", "nvfp4", "hadamard-int4", "smooth-int4"),
    *("kivi-2-g8-r40", "intrinsic-2-nearest-w2", "nuq2", "nuq2-1%", "nuq3-1%-qnorm", "nuq3.2", "nuq3-1%-postrope"),
    *("narrow2", "narrow3", "narrow4", "narrow3-postrope"),
]
SOME = ["int2", "int3-channel", "kivi-2-g8-r40", "nuq2-1%", "narrow2", "narrow3"]


def learned(model, name, tokens=TOKENS):
    """A calibration where the recipe needs one, else its name."""
    if not get_recipe(name).needs_calibration:
        return name
    return calibrate(model, [tokens[:, :64], tokens[:, 64:128]], name)


@pytest.fixture
def model(tiny):
    """With scores that make attention pick tokens, so that keys matter."""
    return tiny(heads=4, kv_heads=2, head_dim=16, initializer_range=0.2)


@pytest.mark.parametrize("name", RECIPES)
def test_a_pass_computes_what_a_strict_packed_cache_does(name, model):
    source, ids = learned(model, name), TOKENS[:, 10:140]
    with torch.no_grad():
        plain = model(ids).logits
        expected = model(ids, past_key_values=PackedCache(model, source, strict=True)).logits
    with quantized_attention(model, source) as quantized:
        found = model(ids).logits
        assert torch.equal(found, expected) and found.requires_grad
        with torch.no_grad(), quantized.off():
            assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(plain, expected) == (name == "fp16")


@pytest.mark.parametrize(
    "shape", [{"heads": 2, "kv_heads": 1, "head_dim": 80}, {"heads": 3, "kv_heads": 3, "head_dim": 64}], ids=str
)
@pytest.mark.parametrize("name", ["int2", "kivi-2-g8-r40", "narrow3"])
def test_other_shapes_and_padding_compute_it_too(name, shape, tiny):
    model = tiny(**shape)
    source, ids = learned(model, name), TOKENS[:, :63]
    mask = (torch.arange(63) >= torch.tensor([0, 7, 30])[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        expected = model(ids, past_key_values=PackedCache(model, source, strict=True), **options).logits
    with quantized_attention(model, source):
        found = model(ids, **options).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_biases_of_projections_and_sliding_windows_are_served(family, tiny):
    model = tiny(family, **({"sliding_window": 20} if family == "mistral" else {}))
    if family == "qwen2":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=5.0)
    with torch.no_grad():
        expected = model(TOKENS, past_key_values=PackedCache(model, "int4", strict=True)).logits
    with quantized_attention(model, "int4"):
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


def rms_norm(module, x):
    return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def rotated(x, theta):
    """Keys or queries [batch, heads, tokens, head_dim] at the positions 0, 1, ..."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * theta ** -(torch.arange(half) / half)
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def plain_llama(model, ids, quantize):
    """Logits; quantize: given a layer's number, its keys before the rotary embedding and its values, returns both."""
    decoder, config = model.model, model.config
    theta, dim = config.rope_parameters["rope_theta"], config.head_dim
    x = decoder.embed_tokens(ids)
    hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for number, layer in enumerate(decoder.layers):
        attention, normed = layer.self_attn, rms_norm(layer.input_layernorm, x)
        query, keys, values = (
            (normed @ part.weight.T).unflatten(-1, (-1, dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = quantize(number, keys, values, lambda keys: rotated(keys, theta))
        group = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = (rotated(query, theta) @ keys.mT / math.sqrt(dim)).masked_fill(hidden, -torch.inf)
        x = x + (scores.softmax(-1) @ values).transpose(1, 2).flatten(2) @ attention.o_proj.weight.T
        mlp, normed = layer.mlp, rms_norm(layer.post_attention_layernorm, x)
        gate = torch.nn.functional.silu(normed @ mlp.gate_proj.weight.T)
        x = x + (gate * (normed @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return rms_norm(decoder.norm, x) @ model.lm_head.weight.T


class Straight:
    """Quantizes as a filled cache has it, with x + (quantized - x) for a gradient, but where a channel is out of its range."""

    def __init__(self, cache):
        self.layers = cache.packed

    def __call__(self, number, keys, values, rotate):
        layer = self.layers[number]
        keys = keys if layer.rotates_on_read else rotate(keys)
        decoded = layer.store.read()
        keys, values = (
            self.one(quantizer, x, elements)
            for quantizer, x, elements in zip(layer.store.quantizers, (keys, values), decoded, strict=True)
        )
        return (rotate(keys) if layer.rotates_on_read else keys), values

    def one(self, quantizer, x, elements):
        scheme = quantizer.scheme
        if scheme.static and not scheme.outliers.fraction:
            inside = ((x - quantizer.zero[:, None]) / quantizer.scale[:, None]).abs() <= 1 + 1e-5
            inside[:, :, :1] |= bool(self.layers[0].store.sinks.count)
            x = x * inside + x.detach() * ~inside
        return x + (elements - x).detach()


def gradients(model):
    found = {name: part.grad.clone() for name, part in model.named_parameters()}
    model.zero_grad()
    return found


def assert_alike(found, expected, tolerance):
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("name", ["int4", "int2", "int3-channel", "kivi-2-g8-r40", "nuq2", "nuq2-1%", "nvfp4"])
def test_gradients_are_those_of_plain_torch(name, model):
    source, ids = learned(model, name), TOKENS[:, 20:150]
    weights = torch.randn(*ids.shape, 97) / 100
    cache = PackedCache(model, source, strict=True)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    expected_logits = plain_llama(model, ids, Straight(cache))
    (expected_logits * weights).sum().backward()
    expected = gradients(model)
    with quantized_attention(model, source):
        found_logits = model(ids).logits
        (found_logits * weights).sum().backward()
    torch.testing.assert_close(found_logits, expected_logits, atol=1e-4, rtol=1e-4)
    assert_alike(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("name", SOME)
def test_gradients_of_queries_are_differences_of_the_loss(name, tiny):
    """One layer's queries change neither its keys nor its values, so that the loss is smooth."""
    model = tiny(layers=1, initializer_range=0.2)
    model.model.norm = model.model.layers[0].post_attention_layernorm = torch.nn.Identity()  # Llama's are in float32
    source = learned(model, name)
    model = model.double()
    projection, direction = model.model.layers[0].self_attn.q_proj.weight, torch.randn(64, 64, dtype=torch.float64)
    step = 1e-5
    with quantized_attention(model, source):

        def loss():
            return (model(TOKENS).logits * torch.linspace(-1, 1, 97)).square().mean()

        loss().backward()
        found = (projection.grad * direction).sum()
        ends = []
        with torch.no_grad():
            for sign in (1, -2):
                projection += sign * step * direction
                ends.append(loss())
    expected = (ends[0] - ends[1]) / (2 * step)
    assert abs(found - expected) <= 1e-6 * abs(expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["kivi-2-g8-r40", "narrow3"])
def test_checkpointing_changes_no_gradient(name, reentrant, model):
    source = learned(model, name)
    model.train()
    with quantized_attention(model, source):
        model(TOKENS, labels=TOKENS).loss.backward()
        expected = gradients(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(TOKENS, labels=TOKENS).loss.backward()
    assert_alike(gradients(model), expected, 1e-6)


@pytest.mark.parametrize("name", SOME)
def test_autocast_computes_what_the_cache_does_under_it(name, tiny):
    model = tiny(layers=1, initializer_range=0.2)  # with more, codes are others where elements were rounded
    source = learned(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            expected = model(TOKENS, past_key_values=PackedCache(model, source, strict=True)).logits
        with quantized_attention(model, source):
            found = model(TOKENS).logits
            found.float().logsumexp(-1).sum().backward()
    assert torch.equal(found, expected)
    rounded = gradients(model)
    with quantized_attention(model, source):
        model(TOKENS).logits.logsumexp(-1).sum().backward()
    for part, exact in gradients(model).items():
        assert torch.nn.functional.cosine_similarity(rounded[part].flatten(), exact.flatten(), 0) > 0.8, part


def test_adapters_learn_and_the_model_beneath_them_does_not(model):
    peft = pytest.importorskip("peft")
    source = learned(model, "narrow2")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    optimizer = torch.optim.Adam([part for part in adapted.parameters() if part.requires_grad], lr=1e-2)
    with torch.no_grad():
        teacher = adapted(TOKENS).logits.log_softmax(-1)
    losses = []
    with quantized_attention(adapted, source):
        for _ in range(12):
            student = adapted(TOKENS).logits.log_softmax(-1)
            loss = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(part.grad is None for name, part in adapted.named_parameters() if "lora_" not in name)
    with torch.no_grad():
        cache = PackedCache(adapted, source, strict=True)
        student = adapted(TOKENS, past_key_values=cache).logits.log_softmax(-1)
    assert torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean") < 0.8 * losses[0]


def test_dropout_and_a_packed_cache_go_on_within(model):
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad(), quantized_attention(model, "int4"):
        expected = model(TOKENS).logits
        assert torch.equal(model(TOKENS, past_key_values=PackedCache(model, "int4", strict=True)).logits, expected)
        model.train()
        assert not torch.allclose(model(TOKENS).logits, expected)


def refused(model, source="int4"):
    with quantized_attention(model, source):
        pass


def test_what_cannot_be_trained_is_refused_in_a_sentence(model, tiny):
    another = calibrate(tiny(seed=1), [TOKENS[:, :64]], "nuq3-1%")
    with pytest.raises(CalibrationError, match=r"belongs to another model .*calibrate this model\.$"):
        refused(model, another)
    with quantized_attention(model, "int4"), pytest.raises(CacheUseError, match=r"already; leave that first\.$"):
        refused(model)
    with quantized_attention(model, "int4"), pytest.raises(CacheUseError, match="takes no cache but a PackedCache"):
        model(TOKENS, past_key_values=DynamicCache(config=model.config))
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(TrainingError, match=r"nothing to train; add adapters, or free some\.$"):
        refused(frozen)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(quantized_attention(frozen, "int4"))
        assert frozen(TOKENS).logits.isfinite().all()
    mixed = tiny()
    mixed.model.layers[1].self_attn.k_proj.bfloat16()
    with pytest.raises(UnsupportedModelError, match=r"does not run .*; use DynamicCache\.$"):
        refused(mixed)


def test_a_model_that_computes_nan_is_refused_and_left_as_it_was(model):
    with torch.no_grad():
        expected = model(TOKENS).logits
        weight = model.model.layers[1].self_attn.k_proj.weight
        before = weight[0, 0].clone()
    with quantized_attention(model, "int4"):
        weight.data[0, 0] = torch.nan
        with pytest.raises(ActivationError, match="NaN or infinity"):
            model(TOKENS)
        weight.data[0, 0] = before
        assert model(TOKENS).logits.isfinite().all()
    assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3", "gpt_neox", "gptj"])
def test_other_families_compute_what_the_cache_does(family):
    model = make(family)
    if family == "gptj":
        with pytest.raises(UnsupportedModelError, match="computes attention by itself"):
            refused(model)
        return
    ids = TOKENS[:2, :70]
    with torch.no_grad():
        expected = model(ids, past_key_values=PackedCache(model, "int4", strict=True)).logits
    with quantized_attention(model, "int4"):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
