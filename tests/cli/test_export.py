"""`narrowkv export`: what it writes and says, and what it refuses before and after measuring."""

import json

import pytest
import torch
from tests.conftest import make_tiny
from tests.families import make
from tests.letters import make_letters

SMALL = ("--window", 64, "--samples", 3, "--check", 2)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A tiny model with a large bias on a slow channel of keys, as Qwen2.5 has it."""
    path, model = tmp_path_factory.mktemp("biased"), make_tiny("qwen2", initializer_range=0.2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[15] = 100.0
    model.save_pretrained(path)
    make_letters().save_pretrained(path)
    return path


def test_every_format_is_written(narrowkv, folder, tmp_path):
    text = ("--text", folder / "text.txt", *SMALL)
    status, out, _ = narrowkv("export", folder, "--format", "onnxruntime-genai", "--out", tmp_path / "a", *text)
    assert status == 0 and "int8, a scale for each channel: 8.001 bits per element; KLD" in out
    assert f"Scales of 2 layers (onnxruntime-genai), saved in {tmp_path / 'a' / 'kv_scales.json'}" in out
    assert len(json.loads((tmp_path / "a" / "kv_scales.json").read_text())["scales"]["k_scales"]) == 2
    for kind, datatype in (("compressed-tensors", "int"), ("vllm-scales", "float")):
        other = ("--datatype", "int8", "--strategy", "head") if datatype == "int" else ()
        json_file = tmp_path / f"{kind}.json"
        given = ("--format", kind, "--out", tmp_path / kind, "--json", json_file, *other, *text)
        assert narrowkv("export", folder, *given)[0] == 0
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config["quantization_config"]["kv_cache_scheme"]["type"] == datatype
        written = json.loads(json_file.read_text())
        assert written["kld_strict"] > 0 and [row["side"] for row in written["layers"]] == ["keys", "values"] * 2


def test_scales_that_break_a_model_are_not_written(narrowkv, folder, biased, tmp_path):
    given = ("--format", "onnxruntime-genai", "--datatype", "int4", "--text", folder / "text.txt", *SMALL)
    status, out, err = narrowkv("export", biased, "--strategy", "tensor", "--out", tmp_path / "out", *given)
    assert status == 1 and "a bias" in err and "would break this model" in err and not (tmp_path / "out").exists()
    assert "KLD" in out  # and what was measured is shown
    assert narrowkv("export", biased, "--strategy", "channel", "--out", tmp_path / "out", *given)[0] == 0


def test_latent_attention_is_refused(narrowkv, folder, tmp_path):
    make("deepseek_v3").save_pretrained(tmp_path / "model")
    make_letters().save_pretrained(tmp_path / "model")
    given = ("--format", "vllm-scales", "--text", folder / "text.txt", "--out", tmp_path / "out", *SMALL)
    status, _, err = narrowkv("export", tmp_path / "model", *given)
    assert status == 1 and "latent attention" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (("--format", "gguf"), "no format 'gguf' of scales; choose one of compressed-tensors, onnxruntime-genai, vllm-scales"),
        (("--format", "vllm-scales", "--datatype", "int4"), "cannot be 'int4', which is not read; choose fp8"),
        (("--format", "onnxruntime-genai", "--strategy", "head"), "choose channel or tensor"),
        (("--format", "compressed-tensors", "--strategy", "token"), "choose tensor or head"),
    ],
)
def test_what_a_format_cannot_say_is_refused_at_once(narrowkv, tmp_path, given, cause):
    status, _, err = narrowkv("export", "no/such/model", "--out", tmp_path / "out", *given)
    assert status == 1 and cause in err


def test_a_checkpoint_needs_a_new_folder_and_all_of_them_text(narrowkv, folder, tmp_path):
    status, _, err = narrowkv("export", folder, "--format", "vllm-scales", "--out", folder)
    assert status == 1 and "has files already" in err
    given = ("--text", folder / "text.txt", "--window", 64, "--samples", 1000, "--out", tmp_path / "out")
    status, _, err = narrowkv("export", folder, "--format", "onnxruntime-genai", *given)
    assert status == 1 and "The text ends with" in err and not (tmp_path / "out").exists()
