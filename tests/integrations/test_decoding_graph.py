"""Decoding by a CUDA graph, for which `tests.replaying` stands in on a CPU: logits are those of plain torch without one."""

import pytest
import torch
from transformers import DynamicCache

from narrowkv import PackedCache, calibrate, cuda_graph, get_recipe
from narrowkv.codec import Quantizer
from narrowkv.codec.cuda import encode as cuda
from narrowkv.errors import ActivationError, CacheUseError, UnsupportedModelError
from narrowkv.integrations import DecodingGraph, decoding_graph

pytestmark = pytest.mark.skipif(cuda.kernels() is None, reason="needs Triton (`pip install triton`)")
PROMPT, LENGTH = 62, 66
CASES = {  # recipe, family and options of the model, of the cache, sequences
    "nuq3-1%": ("nuq3-1%", {}, {}, 1),
    "strict": ("nuq2-1%", {"layers": 1}, {"strict": True}, 1),
    "kivi-2": ("kivi-2-g8-r16", {"layers": 1}, {}, 2),
    "sliding window": ("nuq2", {"family": "mistral", "sliding_window": 50, "layers": 1}, {}, 1),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Single tokens go by interpreted kernels, and many at once by plain torch."""
    replaying = pytest.importorskip("tests.replaying")
    monkeypatch.setattr(cuda, "runs_on", lambda device: True)
    monkeypatch.setattr(Quantizer, "_encoder_on", lambda quantizer, device: None)
    monkeypatch.setattr(Quantizer, "_encoder", None)
    monkeypatch.setattr(decoding_graph, "capture", replaying.capture)


def made(tiny, name, options, recipe):
    model = tiny(head_dim=16, heads=2, kv_heads=1, **options)
    recipe = get_recipe(recipe)
    ids = torch.randint(2, 97, (2, 60))
    return model, calibrate(model, ids, recipe) if recipe.needs_calibration else recipe


def stepped(model, cache, ids, masks=None):
    """Logits of each token, the first of them behind the prompt."""
    with torch.no_grad():
        first = model(ids[:, :PROMPT], past_key_values=cache, attention_mask=None if masks is None else masks[:, :PROMPT])
        logits = [first.logits[:, -1:]]
        for i in range(PROMPT, ids.shape[1]):
            mask = None if masks is None else masks[:, : i + 1]
            positions = None if masks is None else masks[:, : i + 1].sum(1, keepdim=True) - 1
            asked = model(ids[:, i : i + 1], past_key_values=cache, attention_mask=mask, position_ids=positions)
            logits.append(asked.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_without_a_graph(name, tiny, monkeypatch):
    recipe, options, cached, batch = CASES[name]
    model, source = made(tiny, name, options, recipe)
    ids = torch.randint(2, 97, (batch, LENGTH))
    eager = PackedCache(model, source, backend="torch", **cached)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "runs_on", lambda device: False)
        expected = stepped(model, eager, ids)
    cache = PackedCache(model, source, backend="cuda", **cached)
    captures, capture = [], decoding_graph.capture
    monkeypatch.setattr(decoding_graph, "capture", lambda run: captures.append(1) or capture(run))
    with cuda_graph(model, cache):
        found = stepped(model, cache, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # a block is sealed a step later, and summed otherwise
    assert cache.length == eager.length == LENGTH and 1 <= len(captures) <= 3
    assert [layer.store.blocks.tokens for layer in cache.packed] == [layer.store.blocks.tokens for layer in eager.packed]
    for one, other in zip(cache.packed, eager.packed, strict=True):
        torch.testing.assert_close(one.store.read(), other.store.read(), atol=1e-4, rtol=1e-4)


def test_padding_is_seen_and_positions_are_given(tiny):
    model, source = made(tiny, "nuq2", {"layers": 1}, "nuq2")
    ids, masks = torch.randint(2, 97, (2, LENGTH)), torch.ones(2, LENGTH, dtype=torch.int64)
    masks[1, :40] = 0
    expected = stepped(model, PackedCache(model, source, backend="cuda"), ids, masks)  # by the same kernels
    cache = PackedCache(model, source, backend="cuda")
    with cuda_graph(model, cache):
        found = stepped(model, cache, ids, masks)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_generate_uses_the_graph_and_the_model_is_restored_after(tiny):
    model, source = made(tiny, "nuq2", {"layers": 1}, "nuq2")
    ids, options = torch.randint(2, 97, (1, 20)), {"max_new_tokens": 4, "do_sample": False}
    cache = PackedCache(model, source, backend="cuda")
    expected = model.generate(ids, past_key_values=cache, **options)
    cache.reset()
    with cuda_graph(model, cache) as graph:
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
        assert graph._replay is not None
        with pytest.raises(UnsupportedModelError, match="output_hidden_states"):
            model(ids[:, :1], past_key_values=cache, output_hidden_states=True)
    assert "forward" not in model.__dict__


def test_a_compiled_model_is_the_model_in_it(tiny):
    model, source = made(tiny, "nuq2", {"layers": 1}, "nuq2")
    ids, options = torch.randint(2, 97, (1, 20)), {"max_new_tokens": 4, "do_sample": False}
    wrapped = torch.compile(model, backend="eager")
    cache = PackedCache(wrapped, source, backend="cuda")
    expected = model.generate(ids, past_key_values=cache, **options)
    for used in (wrapped, model):
        cache.reset()
        with cuda_graph(wrapped, cache) as graph:
            assert torch.equal(used.generate(ids, past_key_values=cache, **options), expected)
            with torch.no_grad():
                logits = wrapped(expected[:, -1:], past_key_values=cache).logits
            torch.testing.assert_close(logits, graph._logits)
    assert "forward" not in model.__dict__


def test_a_step_that_cannot_be_captured_leaves_the_cache_as_it_was(tiny):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}  # the model itself asks for the largest position
    model, source = made(tiny, "nuq2", {"layers": 1, "rope_parameters": dynamic}, "nuq2")
    ids = torch.randint(2, 97, (1, LENGTH))
    cache, eager = (PackedCache(model, source, backend="cuda") for _ in range(2))
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match="cannot be captured"):
            DecodingGraph(model, cache).step(ids[:, PROMPT : PROMPT + 1])
        assert cache.length == PROMPT
        found = model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache).logits
    torch.testing.assert_close(found, stepped(model, eager, ids[:, : PROMPT + 1])[:, 1:])


def test_unsupported_cases_are_refused(tiny):
    model, source = made(tiny, "nuq2", {"layers": 1}, "nuq2")
    with pytest.raises(UnsupportedModelError, match="backend cuda, not torch"):
        DecodingGraph(model, PackedCache(model, source, backend="torch"))
    with pytest.raises(UnsupportedModelError, match="packed"):
        DecodingGraph(model, PackedCache(model, "fp16", backend="cuda"))
    cache = PackedCache(model, source, backend="cuda")
    with pytest.raises(UnsupportedModelError, match="not None"), cuda_graph(None, cache):
        pass
    for given, said in ((DynamicCache(), "not a DynamicCache"), (None, "not a NoneType")):
        with pytest.raises(CacheUseError, match=said), cuda_graph(model, given):
            pass
    with pytest.raises(CacheUseError, match="another model"):
        DecodingGraph(tiny(layers=1), cache)
    with pytest.raises(CacheUseError, match="prompt"):
        DecodingGraph(model, cache).step(torch.ones(1, 1, dtype=torch.int64))
    cache = PackedCache(model, "int8", backend="cuda")
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="one by one"):
        DecodingGraph(model, cache).step(torch.ones(1, 1, dtype=torch.int64))


def test_elements_that_overflow_are_reported_by_a_later_step(tiny):
    model, source = made(tiny, "nuq2", {"layers": 1}, "nuq2")
    cache, token = PackedCache(model, source, backend="cuda"), torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad():
        model(torch.randint(2, 97, (1, 20)), past_key_values=cache)
        graph = DecodingGraph(model, cache)
        graph.step(token)
        model.model.embed_tokens.weight[1] = float("nan")
        graph.step(token)
        with pytest.raises(ActivationError, match="NaN"):
            graph.step(token)
        cache.reset()
        model.model.embed_tokens.weight[1] = 1.0
        model(token, past_key_values=cache)
        assert graph.step(token).isfinite().all()
