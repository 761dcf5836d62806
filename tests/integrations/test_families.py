"""Over many architectures, found by the probe: the exact recipe gives the tokens of DynamicCache in every mode, and keys that
are stored before the rotary embedding come back rotated right.
"""

import inspect

import pytest
import torch
from tests.families import DENSE, FAMILIES, compare_modes, generate, make, prompt
from transformers import DynamicCache

from narrowkv import PackedCache, Quantization, Recipe, Scheme, Transform, calibrate, disable
from narrowkv.errors import CacheUseError

UNROTATED = Recipe(
    "unrotated", keys=Scheme(Quantization(16, "exact"), Transform(pre_rope=True)), values=Scheme(Quantization(16, "exact"))
)


@pytest.mark.parametrize("family", [*FAMILIES, *DENSE])
def test_tokens_are_those_of_dynamic_cache_in_every_mode(family):
    found = compare_modes(family)
    assert False not in found.values(), found
    assert list(found.values()).count(None) <= 1  # transformers itself has no prompt lookup with linear attention


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_stored_before_the_rotary_embedding_come_back_rotated(family):
    plain, ours = make(family), make(family)
    ids, mask = prompt("padded")
    logits = []
    for model, cache in ((plain, DynamicCache(config=plain.config)), (ours, PackedCache(ours, UNROTATED, strict=True))):
        with torch.inference_mode():
            parts = [
                model(input_ids=part, attention_mask=mask[:, :stop], past_key_values=cache).logits
                for part, stop in zip(ids.split([25, 1, 34], dim=1), (25, 26, 60), strict=True)
            ]
        logits.append(torch.cat(parts, dim=1)[mask.bool()])
    torch.testing.assert_close(*logits, atol=5e-3, rtol=5e-3)


@pytest.mark.wide
@pytest.mark.parametrize("family", [*FAMILIES, *DENSE])
@pytest.mark.parametrize("recipe", ["int4", "int3"])
def test_a_packed_recipe_gives_the_same_tokens_in_chunks_and_with_prompt_lookup(family, recipe):
    if "dynamic" in family or "longrope" in family:
        pytest.skip("its angles depend on the longest sequence seen so far, so on how the prompt is cut")
    model = make(family).double()
    model.set_experts_implementation("eager")  # the others have no float64
    backend = "dense" if family in DENSE else "torch"

    def ours(**options):
        cache = PackedCache(model, recipe, strict=True, backend=backend)
        return generate(model, "greedy", cache, **options)

    assert torch.equal(ours(prefill_chunk_size=7), ours())
    if family != "qwen3_next":  # transformers has no prompt lookup with linear attention
        assert torch.equal(ours(prompt_lookup_num_tokens=4), ours())


@pytest.mark.parametrize("tokens", [40, 60])
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 2}, {"prefill_chunk_size": 10}])
def test_a_model_that_drops_its_cache_where_long_factors_begin_keeps_ours(tokens, strategy):
    plain, ours = make("phi3, longrope"), make("phi3, longrope")
    cache = PackedCache(ours, "fp16")
    if tokens == 40 and "next_sequence_length" not in inspect.getsource(type(plain).prepare_inputs_for_generation):
        # transformers 5.19: with a cache of its own the model goes on from the newest token alone
        expected = generate(plain, "greedy", None, tokens=tokens, use_cache=False)
        strategy = {}
    else:
        expected = generate(plain, "greedy", DynamicCache(config=plain.config), tokens=tokens, **strategy)
    assert torch.equal(generate(ours, "greedy", cache, tokens=tokens, **strategy), expected)
    assert cache.get_seq_length() == tokens + 23


@pytest.mark.parametrize("recipe", ["fp16", "int4", UNROTATED], ids=str)
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_sliding_layers_keep_what_the_window_needs(family, recipe):
    model = make(family)
    cache, everything = PackedCache(model, recipe), PackedCache(model, recipe)
    for layer in everything.packed:
        layer.sliding_window = None
    ids = torch.randint(2, 97, (1, 700))
    with torch.inference_mode():
        for part in ids.split([300, *[1] * 150, 249, 1], dim=1):
            found, expected = (model(part, past_key_values=one).logits for one in (cache, everything))
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)  # sums are merged from other splits
    sliding, whole = cache.packed[0].store, everything.packed[0].store
    assert sliding.length == 700 and sliding.length - sliding.first < 24 + 2 * 64
    nbytes = [sum(tensor.untyped_storage().nbytes() for tensor in store.tensors()) for store in (sliding, whole)]
    assert nbytes[0] < 0.5 * nbytes[1]
    with pytest.raises(CacheUseError, match="sliding-window layer has evicted"):
        cache.crop(-500)
    assert cache.get_seq_length() == 700  # nothing was cropped
    cache.crop(-1)
    everything.crop(-1)
    with torch.inference_mode():
        found, expected = (model(ids[:, :4], past_key_values=one).logits for one in (cache, everything))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *DENSE])
def test_a_calibrated_cache_follows_the_model_as_far_as_its_bits_go(family):
    """8 bits of integer nearly, and 4 bits of a learned codebook better than 2."""
    model = make(family)
    backend = "dense" if family in DENSE else "torch"
    ids = torch.randint(2, 97, (4, 60))
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    loss = {}
    for name in ("int8", "nuq4", "nuq2"):
        name = name + "-postrope" if name.startswith("nuq") and family in DENSE else name
        source = name if name == "int8" else calibrate(model, ids, name, backend=backend)
        cache = PackedCache(model, source, strict=True, backend=backend)
        with torch.inference_mode():
            found = model(input_ids=ids, past_key_values=cache).logits.log_softmax(-1)
        loss[name[:4]] = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert loss["int8"] < 0.2 * loss["nuq2"] and loss["nuq4"] < 0.7 * loss["nuq2"], loss
    disable(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits.log_softmax(-1), expected)
