"""A calibration on disk: it comes back bit for bit, and damage is noticed."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from narrowkv import Calibration, calibrate, get_recipe
from narrowkv.calibration.calibration import DESCRIPTION_FILE, TENSOR_FILE
from narrowkv.errors import CalibrationError, FileFormatError, OutputError


@pytest.fixture
def model(tiny):
    return tiny()


@pytest.fixture
def calibration(model):
    ids = torch.randint(2, 97, (4, 64))
    recipe = get_recipe("nuq3-1%").with_options(sinks=2)
    return calibrate(model, ids.split(2), recipe)


def test_it_comes_back_bit_for_bit(calibration, model, tmp_path):
    calibration.save_pretrained(tmp_path / "a" / "b")
    loaded = Calibration.from_pretrained(tmp_path / "a" / "b", model)
    assert loaded.recipe == calibration.recipe
    assert loaded.fingerprint == calibration.fingerprint
    assert loaded.provenance == calibration.provenance == {"narrowkv": "0.1.0", "sequences": 4, "tokens": 256}
    for ours, theirs in zip(loaded.layers.values(), calibration.layers.values(), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.scheme == other.scheme
            assert mine.tensors().keys() == other.tensors().keys()
            assert all(torch.equal(table, other.tensors()[name]) for name, table in mine.tensors().items())
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [DESCRIPTION_FILE, TENSOR_FILE]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_model_in_another_dtype_is_the_same_model(calibration, tiny, dtype):
    calibration.cache(tiny(dtype=dtype))


@pytest.mark.parametrize("other", [{"seed": 1}, {"kv_heads": 4}, {"layers": 3}, {"head_dim": 8}, {"family": "qwen2"}], ids=str)
def test_another_model_is_refused(calibration, tiny, tmp_path, other):
    stranger = tiny(**other)
    with pytest.raises(CalibrationError, match="another model"):
        calibration.cache(stranger)
    calibration.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="another model"):
        Calibration.from_pretrained(tmp_path, stranger)


def test_every_truncation_and_every_flipped_byte_is_noticed(calibration, tmp_path):
    calibration.save_pretrained(tmp_path)
    for name in (DESCRIPTION_FILE, TENSOR_FILE):
        path = tmp_path / name
        content = path.read_bytes()
        step = max(len(content) // 60, 1)
        for place in range(0, len(content), step):
            path.write_bytes(content[:place])
            with pytest.raises(FileFormatError):
                Calibration.from_pretrained(tmp_path)
            flipped = bytearray(content)
            flipped[place] ^= 4
            path.write_bytes(flipped)
            try:
                loaded = Calibration.from_pretrained(tmp_path)
            except FileFormatError:
                continue
            # the one harmless change: white space between the entries of the JSON file
            assert name == DESCRIPTION_FILE and content[place : place + 1].isspace()
            assert loaded.recipe == calibration.recipe
        path.write_bytes(content)
    Calibration.from_pretrained(tmp_path)


def test_another_version_is_refused(calibration, tmp_path):
    calibration.save_pretrained(tmp_path)
    path = tmp_path / DESCRIPTION_FILE
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "format_version": 99}))
    with pytest.raises(FileFormatError, match="format 99"):
        Calibration.from_pretrained(tmp_path)
    path.write_text(json.dumps({"format": "something else"}))
    with pytest.raises(FileFormatError, match="not a NarrowKV calibration"):
        Calibration.from_pretrained(tmp_path)


def test_tensors_of_another_calibration_are_refused(calibration, tmp_path):
    calibration.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSOR_FILE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / TENSOR_FILE)
    with pytest.raises(FileFormatError, match="checksum"):
        Calibration.from_pretrained(tmp_path)


def test_tables_of_a_wrong_shape_are_refused_even_with_the_right_checksums(calibration, tmp_path):
    quantizer = calibration.layers[1][0]
    for name, table in (("scale", quantizer.scale[:1]), ("lower", quantizer.lower.T.contiguous())):
        damaged = copy.copy(quantizer)
        object.__setattr__(damaged, name, table)
        layers = {0: calibration.layers[0], 1: (damaged, calibration.layers[1][1])}
        dataclasses.replace(calibration, layers=layers).save_pretrained(tmp_path)
        with pytest.raises(FileFormatError, match=r"layers\.1\.keys"):
            Calibration.from_pretrained(tmp_path)


def test_missing_files_are_named(calibration, tmp_path):
    with pytest.raises(FileFormatError, match="no folder"):
        Calibration.from_pretrained("no-such-folder-and-no-such/hub-id")
    calibration.save_pretrained(tmp_path)
    (tmp_path / TENSOR_FILE).unlink()
    with pytest.raises(FileFormatError, match=TENSOR_FILE):
        Calibration.from_pretrained(tmp_path)


def test_a_folder_that_cannot_be_written_is_named_and_stays_clean(calibration, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        calibration.save_pretrained(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match="/proc"):
        calibration.save_pretrained("/proc/narrowkv")


def test_nothing_half_written_stays_behind(calibration, tmp_path, monkeypatch):
    calibration.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left"):
        calibration.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_push_to_hub_uploads_both_files(calibration, monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            uploaded["repo"] = (repo_id, private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            loaded = Calibration.from_pretrained(folder_path)
            uploaded["recipe"] = loaded.recipe.name
            return f"https://hub.example/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert calibration.push_to_hub("me/tables", private=True) == "https://hub.example/me/tables"
    assert uploaded == {"repo": ("me/tables", True), "recipe": "nuq3-1%"}
