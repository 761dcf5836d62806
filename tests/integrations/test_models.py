"""Loading: what a folder or file lacks is given by its cause, with the remedy; GGUF files become models of 16 bits."""

import json
import shutil

import pytest
import torch
from tests.conftest import make_tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from narrowkv import load_model
from narrowkv.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny().save_pretrained(folder)
    words = Tokenizer(WordLevel({chr(32 + i): i for i in range(97)}, unk_token=" "))
    words.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=" ").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_a_whole_folder_loads(folder):
    model, tokenizer = load_model(str(folder))
    assert model.dtype == torch.float32 and not model.training and tokenizer("ab")["input_ids"] == [65, 66]


def keep(folder, *names):
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()


def no_tokenizer(folder):
    keep(folder, "config.json", "model.safetensors")


def settings_of_a_tokenizer_only(folder):
    keep(folder, "config.json", "model.safetensors", "tokenizer_config.json")


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')


def empty_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def other_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "No"}}')


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "frobnicator"}')


def adapter(folder):
    keep(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def lost_shard(folder):
    (folder / "model.safetensors").unlink()
    names = {"lm_head.weight": "model-00001-of-00002.safetensors", "model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def lost_matrix(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def several_gguf(folder):
    keep(folder)
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        (folder / name).write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("harm", "cause", "remedy"),
    [
        (keep, "is empty", "give one"),
        (no_tokenizer, "no tokenizer", "copy"),
        (settings_of_a_tokenizer_only, "no tokenizer", "copy"),
        (broken_tokenizer, "tokenizer cannot be read", "copy"),
        (empty_tokenizer, "tokenizer cannot be read", "copy"),
        (other_tokenizer, "tokenizer cannot be read", "copy"),
        (pickled, "pytorch_model.bin", "safetensors"),
        (no_weights, "no weights", "download"),
        (no_config, "no config.json", "give the folder"),
        (broken_config, "configuration cannot be read", "copy"),
        (unknown_type, "frobnicator", "copy"),
        (adapter, "adapter only", "merge"),
        (cut_weights, "weights cannot be read", "copy"),
        (lost_shard, "model-00001-of-00002.safetensors and 1 more", "copy"),
        (broken_index, "index.json", "copy"),
        (lost_matrix, "lack lm_head.weight", "download"),
        (several_gguf, "2 GGUF files (a-Q4_K_M.gguf, a-Q8_0.gguf)", "name the one"),
    ],
    ids=lambda what: getattr(what, "__name__", ""),
)
def test_missing_files_of_a_model_folder_are_named(folder, harm, cause, remedy):
    harm(folder)
    with pytest.raises(UnsupportedModelError) as device_lengths:
        load_model(str(folder))
    sentence = str(device_lengths.value)
    assert cause in sentence and remedy in sentence and "\n" not in sentence and not sentence.endswith(":")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("./no/such/folder", "no file or folder"),
        ("model.gguf", "no file or folder"),
        ("FILE", "is a file"),
        ("\0", "name"),
        ("", "empty"),
        ("a" * 5000, "too long"),
    ],
)
def test_a_name_that_is_neither_a_file_nor_a_repository_is_refused(tmp_path, name, cause):
    file = tmp_path / "notes.txt"
    file.write_text("x")
    with pytest.raises(UnsupportedModelError, match=cause):
        load_model(str(file) if name == "FILE" else name)


@pytest.mark.parametrize("device", ["meta", "cpux", "", "cpu:x", "cuda:99", "mps", "privateuseone", "vulkan"])
def test_a_device_that_cannot_compute(folder, device):
    with pytest.raises(UnsupportedModelError):
        load_model(str(folder), device=device)


def test_a_folder_that_may_not_be_read(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "iterdir", refuse)
    with pytest.raises(UnsupportedModelError, match="Permission denied"):
        load_model(str(folder))
