"""Measured metrics against fake quantization written from the formulas, on real models and real text."""

import math

import pytest
import torch
from tests.families import make
from transformers.models.llama import modeling_llama

from narrowkv import calibrate, calibrate_many, get_recipe
from narrowkv.errors import ActivationError, TextError
from narrowkv.evaluate import cut_windows, measure
from narrowkv.evaluate.perplexity import filled
from narrowkv.evaluate.retrieval import facts


def fake_quantise(x, quantizer, dims):
    """x [batch, heads, tokens, dim] rounded by the paper's formulas. dims: those that share a range, None if static."""
    scheme, dtype, x = quantizer.scheme, x.dtype, x.float()
    if dims is None:
        scale, zero = quantizer.scale[:, None], quantizer.zero[:, None]
        outside = (
            (x < quantizer.lower[:, None]) | (x > quantizer.upper[:, None])
            if scheme.outliers.fraction
            else torch.zeros_like(x) > 0
        )
    else:
        ordered = x.transpose(1, 2).flatten(2).sort(-1).values
        count = int(ordered.shape[-1] * scheme.outliers.fraction / 2 + 0.5)
        lower, upper = (ordered[..., i, None, None].transpose(1, 2) for i in (count, ordered.shape[-1] - 1 - count))
        scale, zero = ((upper - lower) / 2).half().float(), ((upper + lower) / 2).half().float()
        outside = (x < lower) | (x > upper)
    a = (x - zero) / scale.clamp(min=1e-12)
    borders = (quantizer.codebook[1:] + quantizer.codebook[:-1]) / 2
    rounded = quantizer.codebook[torch.searchsorted(borders, a.contiguous())] * scale + zero
    rounded = torch.where(outside, x.half().float(), rounded)
    rounded[:, :, :1] = x[:, :, :1]  # the sink
    return rounded.to(dtype)


def fake_perplexity(model, calibration, windows, monkeypatch):
    """Perplexity with keys and values rounded in place, through the model's own code."""
    rotate = modeling_llama.apply_rotary_pos_emb
    layer = iter(range(10**9))
    layers = len(calibration.layers)

    def rounding_rotate(q, k, cos, sin, *args, **kwargs):
        return rotate(q, fake_quantise(k, calibration.layers[next(layer) % layers][0], None), cos, sin, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rounding_rotate)
    hooks = []
    for attention, (_, quantizer) in zip(
        (block.self_attn for block in model.model.layers), calibration.layers.values(), strict=True
    ):
        dim = attention.head_dim

        def round_values(module, args, output, quantizer=quantizer, dim=dim):
            values = output.unflatten(-1, (-1, dim)).transpose(1, 2)
            return fake_quantise(values, quantizer, (1, 3)).transpose(1, 2).flatten(2)

        hooks.append(attention.v_proj.register_forward_hook(round_values))
    with torch.inference_mode():
        logits = model(windows, use_cache=False).logits[:, :-1]
    for hook in hooks:
        hook.remove()
    monkeypatch.undo()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())


def test_strict_perplexity_is_that_of_fake_quantization(real_model, stories_text, monkeypatch):
    model, tokenizer = real_model
    model.double()  # in float32 the last bit of a sum may move a number to the next code, in one of the two or the other
    windows = cut_windows(tokenizer, stories_text, 192, 12)
    recipes = [get_recipe(name) for name in ("nuq4-1%", "nuq3-2%", "nuq2")]
    calibrations = calibrate_many(model, windows[:6].split(2), recipes)
    rows = measure(model, calibrations, windows[6:])
    for row, calibration in zip(rows, calibrations, strict=True):
        expected = fake_perplexity(model, calibration, windows[6:], monkeypatch)
        assert row.perplexity_strict == pytest.approx(expected, rel=1e-5)


def test_metrics_of_a_real_model(real_model, stories_text):
    model, tokenizer = real_model
    windows = cut_windows(tokenizer, stories_text, 256, 14)
    recipes = [get_recipe(name) for name in ("nuq4-1%", "nuq3-1%", "nuq2-1%")]
    sources = [*calibrate_many(model, windows[:8].split(2), recipes), *(get_recipe(n) for n in ("fp16", "int4", "int2"))]
    seen = []
    rows = {row.recipe: row for row in measure(model, sources, windows[8:], on_step=lambda *step: seen.append(step))}
    assert seen == [(i, 42) for i in range(1, 43)]
    exact = rows["fp16"]
    assert exact.kld_strict == pytest.approx(0, abs=1e-6)
    assert exact.perplexity_strict == pytest.approx(exact.perplexity_fp, rel=1e-6)
    assert exact.bits_per_element > 32  # this model is loaded in float32, and the figure is honest
    assert exact.recall is None
    assert exact.tokens == 6 * 255
    assert rows["nuq4-1%"].kld_strict < rows["nuq3-1%"].kld_strict < rows["nuq2-1%"].kld_strict < rows["int2"].kld_strict
    assert rows["nuq4-1%"].kld_strict < rows["int4"].kld_strict
    for row in rows.values():
        assert row.perplexity_fp == exact.perplexity_fp
        assert row.nbytes_fp16 * row.bits_per_element == pytest.approx(16 * row.nbytes)


def test_streaming_in_one_chunk_is_exact_and_token_by_token_is_not(real_model, stories_text):
    model, tokenizer = real_model
    windows = cut_windows(tokenizer, stories_text, 100, 2)
    recipe = get_recipe("int2")
    (whole,) = measure(model, [recipe], windows, stream_chunk=100)
    assert whole.perplexity_stream == pytest.approx(whole.perplexity_fp, rel=1e-5)
    (single,) = measure(model, [recipe], windows, stream_chunk=1)
    assert single.perplexity_stream > 1.05 * whole.perplexity_fp
    assert single.perplexity_strict == pytest.approx(whole.perplexity_strict, rel=1e-5)


def test_retrieval_rows_are_scored(real_model, stories_text):
    model, tokenizer = real_model
    filler = tokenizer.encode(stories_text[:5000], add_special_tokens=False)
    batch = facts(tokenizer, filler, 240, 3, 0)
    windows = cut_windows(tokenizer, stories_text, 64, 1)
    (row,) = measure(model, [get_recipe("fp16")], windows, [batch])
    assert row.recall == row.recall_fp
    assert 0 <= row.recall <= 1


def test_a_text_shorter_than_one_window_is_refused(real_model):
    _, tokenizer = real_model
    with pytest.raises(TextError, match="one window needs"):
        cut_windows(tokenizer, "Once upon a time", 2048)


def test_a_model_that_computes_nan_is_refused(tiny):
    model = tiny()
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ActivationError, match="NaN"):
        measure(model, [get_recipe("int4")], torch.randint(2, 97, (1, 20)))


@pytest.mark.parametrize("name", ["int4", "kivi-4", "nuq3-1%"])
def test_a_cache_is_filled_where_projections_add_a_bias(tiny, name):
    model = tiny("qwen2", heads=2, kv_heads=1, head_dim=32)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=10)
    ids = torch.randint(2, 90, (1, 100))
    source = calibrate(model, [ids], name) if get_recipe(name).needs_calibration else get_recipe(name)
    cache = filled(model, source, ids, 250)
    assert cache.length == 250 and all(position_buffer.length == 250 for position_buffer in cache.position_buffers.values())
    with torch.no_grad():
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()


def test_a_filled_layer_lets_go_of_what_has_left_its_window():
    model = make("gemma3_text")
    ids = torch.randint(2, 90, (1, 100))
    cache = filled(model, get_recipe("int4"), ids, 1000)
    short, whole = (layer.store for layer in cache.packed)
    assert whole.length - whole.first == 1000
    assert short.length == 1000 and short.length - short.first < 24 + 64  # whole blocks go
    few, many = (sum(tensor.nbytes for tensor in store.tensors()) for store in (short, whole))
    assert few < many / 4
    with torch.no_grad():
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()


def test_stream_perplexity_is_nan_without_streaming(tiny):
    (row,) = measure(tiny(), [get_recipe("int4")], torch.randint(2, 97, (1, 20)), stream_chunk=None)
    assert math.isnan(row.perplexity_stream) and row.stream_chunk is None and row.perplexity_strict > 1
