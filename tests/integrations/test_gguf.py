"""GGUF files: read into 16 bits with their chat template; damage, strange architectures and too little memory are given."""

import pytest
import torch
from tests.conftest import make_tiny
from tests.gguf_files import write_gguf

import narrowkv
from narrowkv import PackedCache, load_model
from narrowkv.errors import CalibrationError, MissingPackageError, UnsupportedModelError
from narrowkv.integrations import gguf as reading
from narrowkv.plan import read_shape

pytest.importorskip("gguf", reason="needs `pip install 'narrowkv[gguf]'`")


@pytest.fixture(scope="module")
def original():
    return make_tiny("qwen2", layers=1)


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    return write_gguf(original, tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf")


def test_a_file_becomes_a_model_of_16_bits_with_its_chat_template(original, saved, tmp_path):
    said = []
    model, tokenizer = load_model(str(saved), say=said.append)
    assert model.dtype == torch.bfloat16 and not model.training
    assert "become" in said[0] and "bfloat16" in said[0] and "free" in said[0]
    assert load_model(str(saved), "float32")[0].dtype == torch.float32
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "[user] Hi\n[assistant]"
    ids = tokenizer("Hi", return_tensors="pt")["input_ids"]
    assert (model(ids).logits - original(ids).logits).norm() < 0.05 * original(ids).logits.norm()
    out = model.generate(ids, past_key_values=PackedCache(model, "fp16"), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 7)
    model.save_pretrained(tmp_path)  # it is a model like any other


def test_the_only_file_of_a_folder_is_found(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert load_model(str(saved.parent))[0].dtype == load_model(saved.name)[0].dtype == torch.bfloat16


def test_the_named_file_is_read_and_not_one_of_that_name_where_we_stand(original, saved, tmp_path, monkeypatch):
    write_gguf(make_tiny("qwen2", layers=1, seed=5), tmp_path / saved.name)
    monkeypatch.chdir(tmp_path)
    found = load_model(str(saved))[0].model.embed_tokens.weight
    assert (found - original.model.embed_tokens.weight).abs().max() < 0.1


@pytest.mark.parametrize(("rope_state", "cause"), [(0, "damaged"), (3, "damaged"), (500, "damaged"), (-2000, "damaged")])
def test_a_damaged_file_raises_an_error(saved, tmp_path, rope_state, cause):
    path = tmp_path / "cut.gguf"
    path.write_bytes(saved.read_bytes()[:rope_state])
    with pytest.raises(UnsupportedModelError, match=cause):
        load_model(str(path))


def test_an_unsupported_gguf_architecture_raises(original, tmp_path):
    path = write_gguf(original, tmp_path / "strange.gguf", architecture="rwkv6")
    with pytest.raises(UnsupportedModelError, match=r"architecture rwkv6.*original model"):
        load_model(str(path))


def test_missing_tensors_raise_and_are_not_initialized(original, tmp_path):
    original = make_tiny("qwen2", layers=1)
    del original.model.norm.weight
    with pytest.raises(UnsupportedModelError, match=r"lack model\.norm\.weight"):
        load_model(str(write_gguf(original, tmp_path / "lacking.gguf")))


def test_too_little_memory_raises_before_anything_is_read(saved, monkeypatch):
    monkeypatch.setattr(reading, "available_memory", lambda: 10_000)
    with pytest.raises(UnsupportedModelError, match=r"0\.0 GB are free.*NARROWKV_ANY_SIZE"):
        load_model(str(saved))
    monkeypatch.setenv("NARROWKV_ANY_SIZE", "1")
    assert load_model(str(saved))[0].dtype == torch.bfloat16


def test_available_memory_is_below_that_of_the_machine():
    psutil = pytest.importorskip("psutil")
    assert 0 < reading.available_memory() <= psutil.virtual_memory().total


def test_without_the_package_the_extra_is_named(saved, monkeypatch):
    monkeypatch.setattr(reading, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(MissingPackageError, match=r"narrowkv\[gguf\]"):
        load_model(str(saved))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_tables_serve_the_file_and_its_original_alike(tmp_path, kind, tied):
    original = make_tiny("qwen2", layers=3)
    if tied:  # llama.cpp's converter may write the head though it is the embedding
        original.lm_head.weight = original.model.embed_tokens.weight
    read, _ = load_model(str(write_gguf(original, tmp_path / "tiny.gguf", kind)), "float32")
    ids = torch.randint(3, 90, (1, 64))
    for learner, user in ((original, read), (read, original)):
        tables = narrowkv.calibrate(learner, [ids], "nuq3")
        tables.save_pretrained(tmp_path / "tables")
        narrowkv.PackedCache(user, narrowkv.Calibration.from_pretrained(tmp_path / "tables", user))
    with pytest.raises(CalibrationError, match="another model"):
        narrowkv.PackedCache(make_tiny("qwen2", layers=3, seed=5), tables)
    with pytest.raises(CalibrationError, match="another model"):
        narrowkv.PackedCache(read, narrowkv.calibrate(make_tiny("qwen2", layers=3, seed=5), [ids], "nuq3"))


def test_the_planner_reads_the_file_too(saved):
    shape = read_shape(str(saved))
    assert shape.dtype == torch.bfloat16 and shape.to_dict()["layers"][0]["kv_heads"] == 2
    with pytest.raises(UnsupportedModelError, match="no file or folder"):
        read_shape("no-such.gguf")
