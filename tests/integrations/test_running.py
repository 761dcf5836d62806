"""Every call that is refused leaves a cache as it was, and every use that it cannot serve is given in a sentence."""

import copy
import itertools
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from tests.families import make
from transformers import DynamicCache

from narrowkv import PackedCache, calibrate, get_recipe
from narrowkv.errors import CacheUseError, NarrowKVError, NarrowKVWarning, UnsupportedModelError

IDS = torch.arange(2 * 80).view(2, 80) * 31 % 95 + 2


def prompt(model, source="int4", tokens=80, **options):
    cache = PackedCache(model, source, **options)
    with torch.no_grad():
        model(IDS[:, :tokens], past_key_values=cache)
    return cache


def step(model, cache, **options):
    with torch.no_grad():
        return model(IDS[:, -1:], past_key_values=cache, **options).logits


REFUSED = {
    "attention weights": {"output_attentions": True},
    "4-dimensional mask": {"attention_mask": torch.ones(2, 1, 1, 81, dtype=torch.bool)},
    "short mask": {"attention_mask": torch.ones(2, 7, dtype=torch.long)},
    "unknown tensor": {"packed_sequences": torch.ones(2)},
    "no cache wanted": {"use_cache": False},
}


@pytest.mark.parametrize("family", ["llama", "lfm2", "gptj"])
@pytest.mark.parametrize("asked", REFUSED)
def test_a_refused_call_leaves_the_cache_as_it_was(family, asked):
    model = make(family)
    options = {"backend": "dense"} if family == "gptj" else {}
    if (asked, family) in (("unknown tensor", "lfm2"), ("unknown tensor", "gptj"), ("attention weights", "gptj")):
        pytest.skip("found by attention modules alone, or harmless there")
    cache, twin = prompt(model, **options), prompt(model, **options)
    for _ in range(2):
        with pytest.raises(NarrowKVError):
            step(model, cache, **REFUSED[asked])
    assert torch.equal(step(model, cache), step(model, twin))


def test_other_batches_empty_prompts_and_dtypes_leave_the_cache_as_it_was(tiny):
    model = tiny()
    cache, twin = prompt(model), prompt(model)
    for ids in (IDS[:1, :3], IDS[:, :0]):
        with pytest.raises(CacheUseError), torch.no_grad():
            model(ids, past_key_values=cache)
    with pytest.raises(CacheUseError, match="go on as it was begun"), torch.autocast("cpu", torch.bfloat16):
        step(model, cache)
    assert torch.equal(step(model, cache), step(model, twin))


def test_positions_of_the_cache_are_ignored_as_models_ignore_them(tiny):
    model = tiny()
    cache, twin = prompt(model), prompt(model)
    assert torch.equal(step(model, cache, cache_position=torch.tensor([80])), step(model, twin))


def test_a_prompt_that_does_not_go_on_from_the_cache(tiny):
    model = tiny()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for tokens, masked in itertools.product((30, 79, 80), (False, True)):
        cache = prompt(model)
        options["attention_mask"] = (torch.arange(tokens) >= masked).long().expand(2, -1)
        with pytest.raises(CacheUseError, match=f"has 80 tokens and the prompt has {tokens}.*whole conversation.*reset"):
            model.generate(IDS[:, :tokens], past_key_values=cache, **options)
        cache.reset()
        model.generate(IDS[:, :tokens], past_key_values=cache, **options)
    with pytest.raises(CacheUseError, match="update was called by hand"):
        prompt(model).update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)


def test_gradients_that_would_be_wrong_are_refused(tiny):
    model = tiny()
    cache = PackedCache(model, "int4")
    first = model(IDS[:, :40], past_key_values=cache).logits  # a chunk that attends to itself exactly
    expected = model(IDS[:, :40]).logits
    weight = model.model.layers[0].self_attn.k_proj.weight
    grads = [torch.autograd.grad(logits.square().mean(), weight)[0] for logits in (first, expected)]
    torch.testing.assert_close(*grads)
    for ids in (IDS[:, 40:60], IDS[:, 40:41]):
        with pytest.raises(UnsupportedModelError, match=r"Gradients do not flow.*no_grad"):
            model(ids, past_key_values=cache)
    assert cache.length == 40
    with torch.no_grad():
        model(IDS[:, 40:60], past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="Gradients"):
        model(IDS, past_key_values=PackedCache(model, "int4", strict=True))
    model.requires_grad_(False)
    model(IDS[:, 40:60], past_key_values=prompt(model, tokens=40))
    soft = torch.randn(2, 5, 64, requires_grad=True)
    cache = PackedCache(model, "int4")
    model(inputs_embeds=soft, past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="Gradients"):  # a soft prompt in the cache would get too little
        model(IDS[:, :3], past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"sinks": 2, "residual_length": 20}])
def test_gradients_through_an_exact_cache_are_those_of_dynamic_cache(tiny, options):
    model = tiny()
    weight, found = model.model.layers[0].self_attn.k_proj.weight, []
    for cache in (PackedCache(model, get_recipe("fp16").with_options(**options)), DynamicCache()):
        logits = [model(IDS[:, a:b], past_key_values=cache).logits for a, b in ((0, 40), (40, 70), (70, 75), (75, 76))]
        found.append(torch.autograd.grad(torch.cat(logits, dim=1).square().mean(), weight)[0])
    torch.testing.assert_close(*found)


ROWS = {
    "mask": torch.tensor([False, True]),
    "list of bools": [False, True],
    "list": [1],
    "array": np.array([1]),
    "single": 1,
    "0 dimensions": torch.tensor(1),
    "from the end": [-1],
    "int32": torch.tensor([1], dtype=torch.int32),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_rows_are_named_as_people_name_them(family, rows):
    model = make(family)
    cache, twin = prompt(model), prompt(model)
    cache.batch_select_indices(rows)
    twin.reorder_cache(torch.tensor([1]))
    assert cache.batch_size == 1
    with torch.no_grad():
        found = [model(IDS[:1, :1], past_key_values=each).logits for each in (cache, twin)]
    assert torch.equal(*found)


def test_what_does_not_name_rows_or_tokens(tiny):
    model = tiny()
    cache, twin = prompt(model), prompt(model)
    for rows in ([2], [-3], [0.5], [], "0", None, [True], torch.tensor([[0]]), [0, "1"], torch.tensor([False, False])):
        for change in (cache.batch_select_indices, cache.reorder_cache):
            with pytest.raises(CacheUseError):
                change(rows)
    for repeats in (0, -1, 1.5, "2", None):
        with pytest.raises(CacheUseError):
            cache.batch_repeat_interleave(repeats)
    for tokens in (-3.0, "3", None, 3, torch.tensor([-1, -2])):
        with pytest.raises(CacheUseError):
            cache.crop(tokens)
    assert torch.equal(step(model, cache), step(model, twin))
    for tokens in (np.int64(-2), torch.tensor(-2)):
        cache.crop(tokens)
    assert cache.length == 77
    empty = PackedCache(model, "int4")
    empty.reorder_cache([0, 5])
    empty.batch_repeat_interleave(3)
    assert empty.batch_size == -1


def test_a_cache_is_not_pickled_but_copied_with_its_model(tiny, tmp_path):
    model = tiny()
    cache = prompt(model)
    for write in (pickle.dumps, copy.copy, lambda cache: torch.save(cache, tmp_path / "c")):
        with pytest.raises(CacheUseError, match=r"cache\.save\(path\)"):
            write(cache)
    other, copied = copy.deepcopy((model, cache))
    assert torch.equal(step(other, copied), step(model, copy.deepcopy(cache)))
    with pytest.raises(CacheUseError, match="another model"):
        step(model, copied)


def test_a_cache_in_use_by_another_thread(tiny):
    model = tiny()
    cache, twin = prompt(model), prompt(model)
    inside, go_on, found = threading.Event(), threading.Event(), []

    def hold(*_):
        inside.set()
        go_on.wait(30)

    hook = model.model.layers[1].register_forward_pre_hook(hold)
    first = threading.Thread(target=lambda: found.append(step(model, cache)))
    first.start()
    inside.wait(30)
    hook.remove()
    uses = [lambda: step(model, cache), lambda: cache.crop(-1), cache.reset, lambda: cache.batch_select_indices([0])]
    uses += [lambda: copy.deepcopy(cache), lambda: cache.save("nowhere")]
    for use in uses:
        with pytest.raises(CacheUseError, match="in use by another thread"):
            use()
    go_on.set()
    first.join()
    assert torch.equal(found[0], step(model, twin))
    assert torch.equal(step(model, cache), step(model, twin))  # one thread after the other is no misuse


def test_an_interrupted_call_is_noticed(tiny):
    model = tiny()
    cache = prompt(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model, cache)
    hook.remove()
    for _ in range(2):
        with pytest.raises(CacheUseError, match="half-way"):
            step(model, cache)
    cache.reset()
    step(model, cache)


@pytest.mark.parametrize("name", ["narrow3", "nuq3", "int4-channel", "nuq3-1%", "int4"])
def test_elements_out_of_the_learned_range_are_counted_and_warned_about_once(tiny, name):
    model = tiny(attention_bias=True)
    source = calibrate(model, IDS, name) if get_recipe(name).needs_calibration else name
    with warnings.catch_warnings():
        warnings.simplefilter("error", NarrowKVWarning)
        assert prompt(model, source).saturated < 1e-3
    learned = PackedCache(model, source)
    model.model.layers[1].self_attn.k_proj.weight.data[3] *= 1e3
    if name in ("nuq3-1%", "int4"):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", NarrowKVWarning)
            model(IDS, past_key_values=learned)
        assert learned.saturated == 0
        return
    with torch.no_grad(), pytest.warns(NarrowKVWarning, match="far beyond what its calibration has seen"):
        model(IDS[:, :40], past_key_values=learned)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", NarrowKVWarning)
        model(IDS[:, 40:], past_key_values=learned)
    assert learned.saturated > 1e-3
    learned.reset()
    assert learned.saturated == 0
