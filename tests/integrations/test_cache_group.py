"""Rows of one forward pass, a cache each: every row goes on as it would alone."""

import copy

import pytest
import torch
from tests.families import FAMILIES, make

from narrowkv import CacheGroup, PackedCache, calibrate
from narrowkv.errors import CacheUseError, UnsupportedModelError

LENGTHS = (70, 3, 131)  # with blocks and a tail, with a tail alone, with more blocks than one
BY_LENGTH = ("llama, dynamic", "llama, longrope", "phi3, longrope")  # whose angles are those of the longest row
BOUND = 1e-3  # of logits, relative to the largest: another rounding of products may flip a code


@pytest.fixture
def by_row(monkeypatch):
    """Products of torch are those of each row alone."""
    linear = torch.nn.functional.linear

    def each_row(x, weight, bias=None):
        return torch.cat([linear(row, weight, bias) for row in x.split(1)])

    monkeypatch.setattr(torch.nn.functional, "linear", each_row)


def read(model, source, prompts, **options):
    """A cache for each prompt."""
    caches = [PackedCache(model, source, **options) for _ in prompts]
    for cache, prompt in zip(caches, prompts, strict=True):
        model(input_ids=prompt, past_key_values=cache)
    return caches


def drawn(lengths=LENGTHS):
    return [torch.randint(2, 97, (1, length)) for length in lengths]


def alone(model, caches, ids):
    """Logits of new tokens ids [rows, new], cache by cache."""
    rows = [model(input_ids=ids[i : i + 1], past_key_values=cache).logits for i, cache in enumerate(caches)]
    return torch.cat(rows)


def assert_rows_as_alone(model, source, steps=(1, 1, 4, 1), bound=0.0, **options):
    prompts = drawn()
    with torch.inference_mode():
        together, apart = read(model, source, prompts, **options), read(model, source, prompts, **options)
        for new in steps:
            ids = torch.randint(2, 97, (len(prompts), new))
            found, expected = model(input_ids=ids, past_key_values=CacheGroup(together)).logits, alone(model, apart, ids)
            assert (found - expected).abs().max() <= bound * expected.abs().max()
    assert [cache.length for cache in together] == [length + sum(steps) for length in LENGTHS]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*BY_LENGTH, "llama4_text")])
def test_rows_of_every_family(family):
    assert_rows_as_alone(make(family), "int4", steps=(1, 1), bound=BOUND)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("gemma3_text", {}), ("llama", {"strict": True}), ("gemma3_text", {"backend": "torch"})],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["fp16", "int4", "kivi-2-g8-r16", "nuq3-1%", "narrow3"])
@pytest.mark.usefixtures("by_row")
def test_rows_of_every_kind_of_recipe_are_bit_for_bit_as_alone(family, recipe, options):
    """Sinks, a residual, sliding windows, tables, streams."""
    model = make(family)
    source = calibrate(model, torch.randint(2, 97, (1, 130)), recipe) if recipe.startswith("n") else recipe
    assert_rows_as_alone(model, source, **options)


def test_sequences_join_and_leave_at_every_step(tiny):
    model = tiny()
    prompts, wanted = drawn((40, 90, 3, 128, 65)), [6, 20, 12, 9, 15]
    with torch.inference_mode():
        expected = [
            model.generate(prompt, past_key_values=PackedCache(model, "int4"), max_new_tokens=new, do_sample=False)[0]
            for prompt, new in zip(prompts, wanted, strict=True)
        ]
        waiting, running, done = list(range(5)), {}, {}
        while waiting or running:
            if waiting:  # one joins at each step
                i = waiting.pop(0)
                cache = PackedCache(model, "int4")
                first = model(input_ids=prompts[i], past_key_values=cache).logits[0, -1].argmax()
                running[i] = (cache, [*prompts[i][0].tolist(), int(first)])
            ids = torch.tensor([tokens[-1:] for _, tokens in running.values()])
            group = CacheGroup([cache for cache, _ in running.values()])
            for (_, tokens), row in zip(running.values(), model(input_ids=ids, past_key_values=group).logits, strict=True):
                tokens.append(int(row[-1].argmax()))
            for i in [i for i in running if len(running[i][1]) >= prompts[i].shape[1] + wanted[i]]:
                done[i] = running.pop(i)[1]
    assert all(done[i][: len(expected[i])] == expected[i].tolist() for i in range(5))


def test_rows_that_begin_together_with_rows_that_go_on(tiny):
    model = tiny()
    ids = torch.randint(2, 97, (2, 9))
    with torch.inference_mode():
        together, apart = ([*read(model, "int4", drawn((70,))), PackedCache(model, "int4")] for _ in range(2))
        torch.manual_seed(0)
        apart[0] = copy.deepcopy(together[0])
        found = model(input_ids=ids, past_key_values=CacheGroup(together)).logits
        torch.testing.assert_close(found, alone(model, apart, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", BY_LENGTH)
def test_rows_whose_angles_would_be_those_of_a_longer_one_are_refused(family):
    model = make(family)
    with torch.inference_mode():
        caches = read(model, "int4", drawn())
        with pytest.raises(UnsupportedModelError, match="follows the longest row"):
            model(input_ids=torch.full((3, 1), 5), past_key_values=CacheGroup(caches))
        assert [cache.length for cache in caches] == list(LENGTHS)
        short = read(model, "int4", drawn((7, 9)))
        assert model(input_ids=torch.full((2, 1), 5), past_key_values=CacheGroup(short)).logits.isfinite().all()


def test_attention_that_reads_one_length_for_all_rows_is_refused():
    model = make("llama4_text")
    with torch.inference_mode():
        caches = read(model, "int4", drawn())
        with pytest.raises(UnsupportedModelError, match="one length for all rows"):
            model(input_ids=torch.full((3, 1), 5), past_key_values=CacheGroup(caches))
        equal = read(model, "int4", drawn((60, 60)))
        ids = torch.randint(2, 97, (2, 1))
        apart = copy.deepcopy(equal)
        found = model(input_ids=ids, past_key_values=CacheGroup(equal)).logits
        torch.testing.assert_close(found, alone(model, apart, ids), rtol=0, atol=1e-4)


def test_incompatible_options_are_refused(tiny):
    model, other = tiny(), tiny(seed=1)
    with torch.inference_mode():
        one, two = read(model, "int4", drawn((70, 5)))
        (of_another,) = read(other, "int4", drawn((5,)))
        (batch,) = read(model, "int4", [torch.randint(2, 97, (2, 9))])
    refused = {
        "at least one": [],
        "copy it first": [one, one],
        "another model": [one, of_another],
        "batch|has 2": [one, batch],
        "Expected a PackedCache": [one, None],
    }
    for words, caches in refused.items():
        with pytest.raises(CacheUseError, match=words):
            CacheGroup(caches)
    with pytest.raises(UnsupportedModelError, match="dense"):
        CacheGroup([PackedCache(model, "int4", backend="dense")])
    group = CacheGroup([one, two])
    assert repr(group) == "CacheGroup(2 rows of 70, 5 tokens)"
    for change in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
        with pytest.raises(CacheUseError, match="neither beams nor repeated"):
            getattr(group, change)(torch.tensor([0, 0]))
    for change in (group.reset, lambda: group.crop(-1)):
        with pytest.raises(CacheUseError, match="cache of its own"):
            change()


CALLS = {
    "3 rows": {"input_ids": torch.full((3, 1), 5)},
    "padding": {"input_ids": torch.full((2, 1), 5), "attention_mask": torch.tensor([[0, 1], [1, 1]])},
    "one row of positions": {"input_ids": torch.full((2, 1), 5), "position_ids": torch.tensor([[70]])},
    "use_cache off": {"input_ids": torch.full((2, 1), 5), "use_cache": False},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_refused_call_leaves_all_rows_as_they_were(tiny, call):
    model = tiny()
    with torch.inference_mode():
        caches = read(model, "int4", drawn((70, 5)))
        with pytest.raises(CacheUseError):
            model(**CALLS[call], past_key_values=CacheGroup(caches))
        assert [cache.length for cache in caches] == [70, 5]
        model(input_ids=torch.full((2, 1), 5), past_key_values=CacheGroup(caches))
    assert [cache.length for cache in caches] == [71, 6]
