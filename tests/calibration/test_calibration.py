"""A calibration on disk: it comes back bit for bit, and damage is noticed."""

import dataclasses
import json
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from narrowkv import Calibration, PackedCache, __version__, calibrate, get_recipe, tensor_file
from narrowkv.calibration.calibration import FILE
from narrowkv.errors import CalibrationError, FileFormatError, OutputError


@pytest.fixture
def model(tiny):
    return tiny()


@pytest.fixture
def calibration(model):
    ids = torch.randint(2, 97, (4, 64))
    recipe = get_recipe("nuq3-1%").with_options(sinks=2)
    return calibrate(model, ids.split(2), recipe)


def test_saving_and_loading_is_bit_exact(calibration, model, tmp_path):
    calibration.save_pretrained(tmp_path / "a" / "b")
    loaded = Calibration.from_pretrained(tmp_path / "a" / "b", model)
    assert loaded == calibration and loaded != calibration.recipe
    assert loaded != dataclasses.replace(calibration, shapes={})
    assert loaded.recipe == calibration.recipe
    assert loaded.fingerprint == calibration.fingerprint
    assert loaded.provenance == calibration.provenance == {"narrowkv": __version__, "sequences": 4, "tokens": 256}
    for ours, theirs in zip(loaded.layers.values(), calibration.layers.values(), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.scheme == other.scheme
            assert mine.tensors().keys() == other.tensors().keys()
            assert all(torch.equal(table, other.tensors()[name]) for name, table in mine.tensors().items())
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [FILE]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_model_in_another_dtype_is_the_same_model(calibration, tiny, dtype):
    PackedCache(tiny(dtype=dtype), calibration)


@pytest.mark.parametrize("other", [{"seed": 1}, {"kv_heads": 4}, {"layers": 3}, {"head_dim": 8}, {"family": "qwen2"}], ids=str)
def test_another_model_is_refused(calibration, tiny, tmp_path, other):
    stranger = tiny(**other)
    with pytest.raises(CalibrationError, match="another model"):
        PackedCache(stranger, calibration)
    calibration.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="another model"):
        Calibration.from_pretrained(tmp_path, stranger)


def altered(path, header=None, tensors=None, without=()):
    """The file with entries of its header and tensors changed or taken out, and all checksums made right again."""
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["narrowkv"])
    kept = load_file(path) | (tensors or {})
    tensor_file.write(path, old | (header or {}), {name: part for name, part in kept.items() if name not in without}, 0o600)


def test_every_truncation_and_every_flipped_byte_is_noticed(calibration, tmp_path):
    calibration.save_pretrained(tmp_path)
    path = tmp_path / FILE
    content = path.read_bytes()
    for offset in range(0, len(content), len(content) // 120):
        flipped = bytearray(content)
        flipped[offset] ^= 4
        for damaged in (content[:offset], flipped):
            path.write_bytes(damaged)
            with pytest.raises(FileFormatError):
                Calibration.from_pretrained(tmp_path)
    path.write_bytes(content)
    Calibration.from_pretrained(tmp_path)


def test_other_versions_and_other_files_are_refused(calibration, model, tmp_path):
    calibration.save_pretrained(tmp_path)
    for version in (2, 99):
        altered(tmp_path / FILE, {"format_version": version})
        with pytest.raises(FileFormatError, match=f"has format {version}, this NarrowKV reads 3; make it anew"):
            Calibration.from_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(FileFormatError, match="not a narrowkv-calibration file"):
        Calibration.from_pretrained(tmp_path)


def forged_tables(name, table):
    """A table of keys in other shapes, dtypes and orders, and with elements that no calibration finds."""
    yield table.flatten()
    yield table[:1]
    yield table.double()
    yield table.to(torch.int32)
    yield torch.full_like(table, torch.nan)
    yield torch.full_like(table, torch.inf)
    if name in ("codebook", "boundaries"):
        yield table.flip(0)
    if name in ("scale", "lower"):
        yield -table.abs() - 1 if name == "scale" else table + 1e6


@pytest.mark.parametrize("name", ["codebook", "boundaries", "scale", "zero", "lower", "upper"])
def test_a_table_that_is_missing_or_forged_is_refused_even_with_the_right_checksums(calibration, tmp_path, name):
    key = f"layers.1.keys.{name}"
    calibration.save_pretrained(tmp_path)
    table = load_file(tmp_path / FILE)[key]
    altered(tmp_path / FILE, without=[key])
    with pytest.raises(FileFormatError, match=rf"layers\.1\.keys: .*{name}"):
        Calibration.from_pretrained(tmp_path)
    for forged in forged_tables(name, table):
        if forged.shape == table.shape and torch.equal(forged.to(table.dtype), table) and forged.dtype == table.dtype:
            continue
        altered(tmp_path / FILE, tensors={key: forged})
        with pytest.raises(FileFormatError, match=r"layers\.1\.keys"):
            Calibration.from_pretrained(tmp_path)
    altered(tmp_path / FILE, tensors={key: table, "layers.9.keys.scale": table})
    with pytest.raises(FileFormatError, match="does not belong"):
        Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mean", "steps", "weight", "outlier_threshold"])
def test_forged_tables_of_trellis_coded_streams_are_refused(model, tmp_path, name):
    key = f"layers.0.values.{name}"
    calibrate(model, torch.randint(2, 97, (2, 64)), "narrow3").save_pretrained(tmp_path)
    table = load_file(tmp_path / FILE)[key]
    altered(tmp_path / FILE, without=[key])
    with pytest.raises(FileFormatError, match=rf"layers\.0\.values: .*{name}"):
        Calibration.from_pretrained(tmp_path)
    for forged in (
        table.new_zeros(0),
        table.new_ones(2),
        table.double(),
        table.unsqueeze(0),
        torch.full_like(table, torch.nan),
    ):
        altered(tmp_path / FILE, tensors={key: forged})
        with pytest.raises(FileFormatError, match=r"layers\.0\.values"):
            Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"shapes": {}},
        {"shapes": {"0": [2, 16]}},
        {"shapes": {"0": [2, 16], "1": [10**30, 16]}},
        {"shapes": {"0": [2, 16], "1": [2.0, 16]}},
        {"shapes": {"0": [2, 16], "-1": [2, 16]}},
        {"provenance": None},
        {"fingerprint": {}},
        {"fingerprint": None},
        {"recipe": None},
    ],
    ids=str,
)
def test_a_forged_header_is_refused_even_with_the_right_checksums(calibration, tmp_path, header):
    calibration.save_pretrained(tmp_path)
    altered(tmp_path / FILE, header)
    with pytest.raises(FileFormatError, match="no usable calibration"):
        Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "count"), [("sinks", 10**30), ("sinks", 10**9), ("window", 10**30), ("layers", {str(10**9): None})]
)
def test_counts_in_a_forged_recipe_are_bounded(calibration, tmp_path, name, count):
    calibration.save_pretrained(tmp_path)
    plain = calibration.recipe.to_dict()
    altered(tmp_path / FILE, {"recipe": plain | {name: count if name != "layers" else {str(10**9): plain}}})
    with pytest.raises(FileFormatError, match="no usable calibration"):
        Calibration.from_pretrained(tmp_path)


def test_a_file_that_is_no_calibration_raises_with_the_cause(calibration, tmp_path):
    with pytest.raises(FileFormatError, match="no folder"):
        Calibration.from_pretrained("no-such-folder-and-no-such/hub-id")
    with pytest.raises(FileFormatError, match=f"has no {FILE}"):
        Calibration.from_pretrained(tmp_path)
    (tmp_path / FILE).mkdir()
    with pytest.raises(FileFormatError, match="Is a directory"):
        Calibration.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match="Not a directory"):
        Calibration.from_pretrained(tmp_path / "file")


def test_a_folder_that_cannot_be_written_is_named_and_stays_clean(calibration, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        calibration.save_pretrained(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match="/proc"):
        calibration.save_pretrained("/proc/narrowkv")
    (tmp_path / "folder" / FILE).mkdir(parents=True)
    with pytest.raises(OutputError, match="it is a folder"):
        calibration.save_pretrained(tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [FILE]


def test_a_concurrent_reader_sees_the_old_calibration_or_the_new_one(calibration, tmp_path):
    versions = [dataclasses.replace(calibration, provenance={"version": version}) for version in range(2)]
    versions[0].save_pretrained(tmp_path)
    done = threading.Event()

    def write():
        for learned_rotation in range(40):
            versions[learned_rotation % 2].save_pretrained(tmp_path)
        done.set()

    writer, seen = threading.Thread(target=write), set()
    writer.start()
    while not done.is_set():
        seen.add(Calibration.from_pretrained(tmp_path).provenance["version"])
    writer.join()
    assert seen <= {0, 1} and [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_interrupted_write_leaves_no_file(calibration, tmp_path, monkeypatch):
    calibration.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left"):
        calibration.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_push_to_hub_uploads_the_file(calibration, monkeypatch):
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
