"""Caches on disk: generation goes on as if nothing had been, and no damaged or foreign file gets through."""

import copy
import json
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tests.conftest import make_tiny
from tests.families import make

from narrowkv import PackedCache, calibrate, get_recipe, tensor_file
from narrowkv.errors import CacheUseError, CalibrationError, FileFormatError, NarrowKVError, OutputError

RECIPES = [
    *("fp16", "int4", "nuq3-1%", "window and sinks", "kivi-2-g16-r40", "fp4-g16", "nvfp4", "smooth-int8"),
    *("narrow2.5", "narrow3", "intrinsic-2", "intrinsic-2-nearest-kmeans"),
]


def source_of(model, name):
    if name == "window and sinks":
        recipe = get_recipe("int3").with_options(residual_length=20, sinks=3)
    elif name == "narrow without outliers":
        recipe = get_recipe("narrow2.25")
        sides = (recipe.search_space.keys, recipe.search_space.values)
        keys, values = (tuple(scheme.with_settings(outliers=0.0) for scheme in side) for side in sides)
        recipe = replace(recipe, search_space=replace(recipe.search_space, keys=keys, values=values))
    else:
        recipe = get_recipe(name)
    return calibrate(model, torch.randint(2, 97, (2, 60)), recipe) if recipe.needs_calibration else recipe


def read_prompt(model, source, batch=2, tokens=150, **options):
    cache = PackedCache(model, source, **options)
    ids = torch.randint(2, 97, (batch, tokens))
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    return cache, ids


def go_on(model, cache, ids):
    with torch.inference_mode():
        more = torch.cat([ids, ids[:, :3]], dim=1)
        return model.generate(more, past_key_values=cache, max_new_tokens=40, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tokens", [10, 64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_goes_on_from_a_loaded_cache(tiny, tmp_path, name, tokens, dtype):
    model = tiny(dtype=dtype)
    source = source_of(model, name)
    cache, ids = read_prompt(model, source, tokens=tokens)
    cache.save(tmp_path / "prompt.safetensors", ids)
    loaded = PackedCache.load(tmp_path / "prompt.safetensors", model, source, token_ids=ids)
    assert loaded.get_seq_length() == tokens
    assert loaded.elements == cache.elements
    for ours, theirs in zip(loaded.packed, cache.packed, strict=True):
        for found, expected in zip(ours.store.read(), theirs.store.read(), strict=True):
            assert torch.equal(found, expected)
    assert torch.equal(go_on(model, loaded, ids), go_on(model, cache, ids))


@pytest.mark.parametrize("name", ["int4", "nvfp4", "smooth-int8", "intrinsic-2-nearest"])
def test_after_crop_and_select_what_is_left_is_saved(tiny, tmp_path, name):
    model = tiny()
    source = source_of(model, name)
    cache, _ = read_prompt(model, source, tokens=200)
    cache.crop(-90)
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    with torch.inference_mode():
        model(torch.randint(2, 97, (3, 30)), past_key_values=cache)
    cache.save(tmp_path / "c")
    loaded = PackedCache.load(tmp_path / "c", model, source)
    for ours, theirs in zip(loaded.packed, cache.packed, strict=True):
        assert torch.equal(ours.store.read()[0], theirs.store.read()[0])
    assert loaded.nbytes <= cache.nbytes


@pytest.mark.parametrize("name", ["window and sinks", "narrow3"])
def test_a_state_is_a_copy_that_makes_any_number_of_caches(tiny, name):
    model = tiny()
    source = source_of(model, name)
    cache, ids = read_prompt(model, source, tokens=100)
    state = cache.state(ids)
    expected = go_on(model, cache, ids)
    for _ in range(2):
        again = PackedCache.from_state(state, model, source, token_ids=ids)
        assert torch.equal(go_on(model, again, ids), expected)
        again.crop(-again.length + 1)


def test_a_state_names_only_settings_that_differ_from_the_defaults(tiny):
    """So a field that a later version adds makes no saved cache unloadable."""
    recipe = read_prompt(tiny(), "int4")[0].state().header["recipe"]
    assert recipe == {"name": "int4", "keys": {"bits": 4, "datatype": "int"}, "values": {"bits": 4, "datatype": "int"}}


def test_a_file_of_something_else_is_refused_with_the_reason(tiny, tmp_path):
    model, path = tiny(), tmp_path / "c"
    cache, ids = read_prompt(model, "int4")
    cache.save(path, ids)
    with pytest.raises(CalibrationError, match="another recipe than int3"):
        PackedCache.load(path, model, "int3")
    with pytest.raises(CalibrationError, match="another model"):
        PackedCache.load(path, tiny(seed=1), "int4")
    with pytest.raises(CalibrationError, match="model in float32"):
        PackedCache.load(path, tiny(dtype=torch.bfloat16), "int4")
    with pytest.raises(CacheUseError, match="another prompt"):
        PackedCache.load(path, model, "int4", token_ids=ids + 1)
    one, other = (calibrate(model, torch.randint(2, 97, (1, 60)), "nuq3") for _ in range(2))
    read_prompt(model, one)[0].save(path)
    with pytest.raises(CalibrationError, match="another calibration"):
        PackedCache.load(path, model, other)
    PackedCache.load(path, model, one)


def test_saving_what_cannot_be_saved(tiny, tmp_path):
    model = tiny()
    with pytest.raises(CacheUseError, match="nothing to save"):
        PackedCache(model, "int4").save(tmp_path / "c")
    cache, ids = read_prompt(model, "int4")
    with pytest.raises(CacheUseError, match="2 x 150 tokens"):
        cache.save(tmp_path / "c", ids[:, 1:])
    with pytest.raises(OutputError, match="Cannot write"):
        cache.save("/proc/nothing/c")
    assert not list(tmp_path.iterdir())


def test_an_earlier_version_is_refused(tiny, tmp_path):
    model, path = tiny(), tmp_path / "c"
    read_prompt(model, "int4")[0].save(path)
    altered(path, {"format_version": 1})
    with pytest.raises(FileFormatError, match="has format 1, this NarrowKV reads 2; make it anew"):
        PackedCache.load(path, model, "int4")


def altered(path, header=None, tensors=None):
    """The file with fields of its header and tensors changed, and every checksum made right again."""
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["narrowkv"])
    tensor_file.write(path, old | (header or {}), load_file(path) | (tensors or {}), 0o600)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 1},
        {"tokens": 151},
        {"tokens": -1},
        {"batch": 10**12},
        {"batch": True},
        {"shapes": [[1, 16], [1, 16]]},
        {"shapes": []},
        {"dtype": "float64"},
        {"tokens": 10**30},
        {"fingerprint": {"architecture": "llama", "weights": {"a": [10**400]}}},
        {"fingerprint": {}},
        {"fingerprint": None},
        {"recipe": []},
    ],
    ids=str,
)
def test_a_hostile_header_is_refused_even_with_its_checksum_right(tiny, tmp_path, changes):
    model, path = tiny(), tmp_path / "c"
    read_prompt(model, "int4")[0].save(path)
    altered(path, changes)
    with pytest.raises(NarrowKVError):
        PackedCache.load(path, model, "int4")


def swapped(index):
    return torch.cat([index[1:2], index[:1], index[2:]])


FORGED = {
    "block_tokens": [lambda part: part - 100, lambda part: part * 0],
    "keys.outlier_index": [
        lambda part: part * 0 - 7,
        lambda part: part.flip(0),
        swapped,
        lambda part: part[:1].expand(len(part)),
    ],
    "keys.outlier_offsets": [lambda part: part.flip(0), lambda part: part + 1, lambda part: part * 0],
    "keys.outlier_values": [lambda part: part * torch.nan],
    "values.scale": [lambda part: part * torch.inf, lambda part: -part, lambda part: part * torch.nan],
    "tail.keys.codes": [lambda part: part | 255],
    "tail.keys.outlier_index": [swapped, lambda part: part + 10**9],
    "sink_index": [lambda part: part - 7, lambda part: part + 1000, lambda part: part * 0 + torch.tensor([5, 3])],
    "sinks.keys": [lambda part: part * torch.nan],
    "rope_state.positions": [
        lambda part: -part - 1,
        lambda part: part[0],
        lambda part: part[:, :-1],
        lambda part: part.long(),
    ],
}


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, forgeries in FORGED.items() for at in range(len(forgeries))])
def test_forged_elements_are_refused_even_with_valid_checksums(tiny, tmp_path, name, at):
    """A forger can make checksums right: whatever compiled code trusts is checked all the same."""
    model, path = tiny(), tmp_path / "c"
    recipe = get_recipe("nuq3-1%").with_options(sinks=2)
    source = calibrate(model, torch.randint(2, 97, (2, 60)), recipe)
    read_prompt(model, source)[0].save(path)
    PackedCache.load(path, model, source)
    key = next(key for key in sorted(load_file(path)) if key.endswith(name))
    altered(path, tensors={key: FORGED[name][at](load_file(path)[key])})
    with pytest.raises(FileFormatError, match="cannot be loaded"):
        PackedCache.load(path, model, source)


def test_what_was_loaded_does_not_change_with_the_file(tiny, tmp_path):
    model, path = tiny(), tmp_path / "c"
    read_prompt(model, "int4")[0].save(path)
    loaded = PackedCache.load(path, model, "int4")
    before = loaded.packed[0].store.read()[0].clone()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert torch.equal(loaded.packed[0].store.read()[0], before)


def test_conversations_are_private(tiny, tmp_path):
    read_prompt(tiny(), "int4")[0].save(tmp_path / "c")
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600


def test_unreadable_files_raise_with_the_cause(tiny, tmp_path):
    for path, cause in ((tmp_path, "Is a directory"), (tmp_path / "nothing", "does not exist"), (tmp_path / "a\0b", "NUL")):
        with pytest.raises(FileFormatError, match=cause):
            PackedCache.load(path, tiny(), "int4")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, a saved cache's bytes, and a folder for mutants."""
    model = make_tiny(layers=1)
    torch.manual_seed(0)
    cache, _ = read_prompt(model, "int4", batch=1, tokens=70)
    path = tmp_path_factory.mktemp("fuzz") / "c"
    cache.save(path)
    return model, path.read_bytes(), path


def load_mutant(saved, content):
    model, original, path = saved
    path.write_bytes(content)
    try:
        loaded = PackedCache.load(path, model, "int4")
    except NarrowKVError:
        return
    # the one thing that may pass: padding of the header, which means nothing
    path.write_bytes(original)
    expected = PackedCache.load(path, model, "int4")
    for ours, theirs in zip(loaded.packed, expected.packed, strict=True):
        assert torch.equal(ours.store.read()[0], theirs.store.read()[0])
        assert torch.equal(ours.store.read()[1], theirs.store.read()[1])


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_mutated_files_never_crash_and_never_give_wrong_numbers(saved, data):
    content = bytearray(copy.copy(saved[1]))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "header length", "splice"]))
    offset = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[offset] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[offset : offset + data.draw(st.integers(1, len(content)))]
    elif kind == "insert":
        content[offset:offset] = data.draw(st.binary(min_size=1, max_size=40))
    elif kind == "header length":
        content[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    else:
        other = data.draw(st.integers(0, len(content) - 1))
        content[offset : offset + 16] = content[other : other + 16]
    load_mutant(saved, bytes(content))


@pytest.mark.parametrize(("family", "missing"), [("llama", 64), ("mistral", 131), ("mistral", 2**62), ("mistral", -1)])
def test_a_forged_state_cannot_mark_needed_tokens_as_missing(tmp_path, family, missing):
    model, path = make(family), tmp_path / "c"
    cache, _ = read_prompt(model, "int4", batch=1, tokens=131)
    cache.save(path)
    altered(path, {}, {"layers.0.missing": torch.tensor(missing)})
    with pytest.raises(FileFormatError, match=r"layer 0 has evicted tokens that it needs|tensor missing has elements"):
        PackedCache.load(path, model, "int4")


@pytest.mark.parametrize(("family", "first"), [("llama", 64), ("llama", 2**62), ("mistral", 128)])
def test_a_forged_state_cannot_evict_tokens_that_the_window_needs(tmp_path, family, first):
    model, path = make(family), tmp_path / "c"
    cache = PackedCache(model, "int4")
    with torch.inference_mode():
        for tokens in (130, 1):
            model(torch.randint(2, 97, (1, tokens)), past_key_values=cache)
    cache.save(path)
    assert PackedCache.load(path, model, "int4").length == 131
    evicted = cache.packed[0].store.first
    altered(path, {"tokens": 131 + first - evicted}, {f"layers.{i}.evicted": torch.tensor(first) for i in range(2)})
    if family == "mistral":  # a longer past than there was, all of it out of sight: nothing wrong can come of it
        loaded = PackedCache.load(path, model, "int4")
        with torch.inference_mode():
            assert model(torch.randint(2, 97, (1, 1)), past_key_values=loaded).logits.isfinite().all()
        return
    with pytest.raises(FileFormatError, match="cannot be loaded"):
        PackedCache.load(path, model, "int4")
