"""Stored beginnings of prompts: which is found, what they take, and that folders of others are not trusted."""

import copy
import os
import stat

import pytest
import torch
from tests.families import make

from narrowkv import PackedCache
from narrowkv.errors import OutputError
from narrowkv.serve.prefixes import Prefixes, croppable

IDS = [token * 31 % 95 + 2 for token in range(400)]


@pytest.fixture
def model(tiny):
    return tiny(head_dim=32)


def read(model, ids, source="int4", cache=None, chunk=64):
    """A cache that has read these tokens as the engine does."""
    cache = cache or PackedCache(model, source)
    with torch.inference_mode():
        for part in torch.tensor([ids]).split(chunk, dim=1):
            model(input_ids=part, past_key_values=cache)
    return cache


def with_prefix(model, length=256, budget=2**30, scope=""):
    prefixes = Prefixes(budget, 64)
    prefixes.add(IDS[:length], scope, read(model, IDS[:length]))
    return prefixes


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (IDS, 256),  # goes on
        (IDS[:256], 192),  # one token at least is read
        (IDS[:257], 256),
        ([*IDS[:130], *[5] * 100], 128),  # goes another way
        (IDS[:64], 0),
        (IDS[1:], 0),
    ],
)
def test_the_longest_beginning_at_a_multiple_is_found(model, prompt, expected):
    found = with_prefix(model).find(prompt, "")
    assert (found[1] if found else 0) == expected
    assert found is None or found[0].length == expected


@pytest.mark.parametrize("length", [192, 256])
def test_what_follows_a_reused_prefix_is_bit_for_bit_what_follows_a_fresh_one(model, length):
    prefixes = with_prefix(model)
    reused, _ = prefixes.find(IDS[: length + 30], "")
    fresh = read(model, IDS[:length])
    with torch.inference_mode():
        rest = torch.tensor([IDS[length : length + 30]])
        found, expected = (model(input_ids=rest, past_key_values=cache).logits for cache in (reused, fresh))
    assert torch.equal(found, expected)
    again, _ = prefixes.find(IDS[: length + 1], "")  # the stored one has not changed
    assert again.length == length


def test_blocks_are_shared_and_counted_once(model):
    prefixes = Prefixes(2**30, 64)
    cache = read(model, IDS[:256])
    prefixes.add([*IDS[:256]], "a", cache)
    alone = prefixes.nbytes
    prefixes.add([*IDS[:256]], "b", cache)
    assert alone <= prefixes.nbytes < 1.2 * alone and len(prefixes.stored) == 2


def test_a_longer_prefix_takes_the_place_of_a_shorter_one(model):
    prefixes = with_prefix(model, 128)
    prefixes.add(IDS[:320], "", read(model, IDS[:320]))
    prefixes.add(IDS[:192], "", read(model, IDS[:192]))
    assert [len(prefix.ids) for prefix in prefixes.stored] == [320]


def test_the_least_recently_used_goes_first(model):
    one = with_prefix(model).nbytes
    prefixes = Prefixes(int(2.5 * one), 64)
    starts = [[i + 2, *IDS[1:256]] for i in range(3)]
    for ids in starts[:2]:
        prefixes.add(ids, "", read(model, ids))
    assert prefixes.find([*starts[0], 5], "")  # used again
    prefixes.add(starts[2], "", read(model, starts[2]))
    found = [prefixes.find([*ids, 5], "") is not None for ids in starts]
    assert found == [True, False, True] and prefixes.nbytes <= prefixes.budget
    assert not with_prefix(model, budget=100).stored and not with_prefix(model, budget=0).stored


def test_scopes_do_not_see_each_other(model):
    prefixes = with_prefix(model, scope="one")
    assert prefixes.find(IDS, "two") is None and prefixes.find(IDS, "") is None and prefixes.find(IDS, "one")


@pytest.mark.parametrize(("family", "source"), [("mistral", "int4"), ("llama", "kivi-2-g8-r16"), ("lfm2", "int4")])
def test_caches_that_cannot_be_cut_are_found_whole_alone(family, source):
    model = make(family)
    cache = read(model, IDS[:256], source)
    assert not croppable(cache)
    prefixes = Prefixes(2**30, 64)
    prefixes.add(IDS[:256], "", cache)
    assert prefixes.find(IDS[:200], "") is None
    found, length = prefixes.find(IDS, "")
    assert length == 256
    with torch.inference_mode():
        rest = torch.tensor([IDS[256:260]])
        logits = [model(input_ids=rest, past_key_values=one).logits for one in (found, copy.deepcopy(cache))]
    assert torch.equal(*logits)


def test_prefixes_survive_a_restart(model, tmp_path):
    prefixes = with_prefix(model, scope="one")
    other = [7, *IDS[:127]]
    prefixes.add(other, "", read(model, other))
    folder = tmp_path / "prefixes"
    assert prefixes.save(folder) == 2
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
    again = Prefixes(2**30, 64)
    assert again.load(folder, model, "int4") == 2
    reused, length = again.find(IDS, "one")
    assert length == 256 and again.find(IDS, "") is None and again.find([*other, 3], "")[1] == 128
    with torch.inference_mode():
        rest = torch.tensor([IDS[256:300]])
        logits = [model(input_ids=rest, past_key_values=one).logits for one in (reused, read(model, IDS[:256]))]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)  # loaded blocks are dequantized in other tiles
    again.stored = again.stored[:1]
    assert again.save(folder) == 1 and len(list(folder.iterdir())) == 1


def damaged(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


FORGED = {
    "a damaged file": damaged,
    "no file of ours": lambda path: path.write_bytes(b"cos\nsystem\n(S'true'\ntR."),
    "an empty file": lambda path: path.write_bytes(b""),
    "the middle of one": lambda path: path.write_bytes(path.read_bytes()[:500]),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_file_that_somebody_changed_is_left_out(model, tmp_path, how, caplog):
    folder = tmp_path / "prefixes"
    with_prefix(model).save(folder)
    (path,) = folder.iterdir()
    FORGED[how](path)
    assert Prefixes(2**30, 64).load(folder, model, "int4") == 0
    assert "is not used" in caplog.text


def test_prefixes_of_another_model_recipe_or_multiple_are_left_out(model, tiny, tmp_path):
    folder = tmp_path / "prefixes"
    with_prefix(model, 192).save(folder)
    for other, source, multiple in ((tiny(head_dim=32, layers=3), "int4", 64), (model, "int3", 64), (model, "int4", 128)):
        assert Prefixes(2**30, multiple).load(folder, other, source) == 0
    assert Prefixes(2**30, 64).load(folder, model, "int4") == 1


def test_a_folder_that_others_may_write_to_is_refused(model, tmp_path):
    tmp_path.chmod(0o777)
    for use in (lambda: with_prefix(model).save(tmp_path), lambda: Prefixes(1, 64).load(tmp_path, model, "int4")):
        with pytest.raises(OutputError, match="Others may write"):
            use()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot use"):
        with_prefix(model).save(tmp_path / "file" / "below")
    assert os.listdir(tmp_path) == ["file"]
