"""Checkpoints with scales, against what compressed-tensors and vLLM publish and check; their own tests read them back."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from tests.families import make
from tests.letters import make_letters

from narrowkv.errors import OutputError, UnsupportedModelError
from narrowkv.exports import StaticQuantization, checkpoint, observe_ranges
from narrowkv.exports.checkpoint import checkpoint_folder, write_checkpoint
from narrowkv.integrations.preparation import model_info_for

# of compressed-tensors' QuantizationArgs and QuantizationConfig
SCHEME = {"num_bits": int, "type": str, "strategy": str, "symmetric": bool, "dynamic": bool}
CONFIG = {"quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme"}
BOTH = [("fp8", "tensor"), ("int8", "head"), ("int4", "tensor")]


def saved(model, path, shards=False):
    model.save_pretrained(path, max_shard_size="30KB" if shards else "5GB")
    make_letters().save_pretrained(path)
    return path


def exported(model, source, out, quantization):
    info = model_info_for(model, "auto", [])
    ranges = observe_ranges(model, info, [torch.randint(2, 97, (1, 40))])
    write_checkpoint(out, checkpoint_folder(str(source)), model, info, quantization, ranges)
    return ranges


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(("datatype", "strategy"), BOTH)
def test_the_checkpoint_is_as_published(tiny, tmp_path, datatype, strategy, shards):
    model, quantization = tiny(kv_heads=2), StaticQuantization(datatype, strategy)
    source, out = saved(model, tmp_path / "model", shards), tmp_path / "out"
    ranges = exported(model, source, out, quantization)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert not (out / "model.safetensors").exists()  # transformers would read it alone
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    assert index["metadata"]["total_size"] >= sum(x.nbytes for tensors in files.values() for x in tensors.values())
    before = {name: x for path in source.glob("*.safetensors") for name, x in load_file(path).items()}
    after = {name: x for tensors in files.values() for name, x in tensors.items()}
    assert all(torch.equal(after.pop(name), x) for name, x in before.items())
    for i, one in enumerate(ranges):
        for part, largest in (("k_scale", one.keys), ("v_scale", one.values)):
            scale = after.pop(f"model.layers.{i}.self_attn.{part}")
            assert scale.dtype == torch.float32 and list(scale.shape) == ([1] if strategy == "tensor" else [2, 1, 1])
            assert torch.equal(scale.flatten(), quantization.scales(largest).flatten())
    assert not after and (out / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()


@pytest.mark.parametrize(("datatype", "strategy"), BOTH)
def test_the_configuration_is_as_published(tiny, tmp_path, datatype, strategy):
    source, out = saved(tiny(), tmp_path / "model"), tmp_path / "out"
    exported(tiny(), source, out, StaticQuantization(datatype, strategy))
    written, before = (json.loads((path / "config.json").read_text()) for path in (out, source))
    config = written.pop("quantization_config")
    assert written == before and set(config) == CONFIG
    assert config["quant_method"] == "compressed-tensors" and not config["config_groups"]
    scheme = config["kv_cache_scheme"]
    assert {name: type(setting) for name, setting in scheme.items()} == SCHEME
    expected = {"fp8": (8, "float"), "int8": (8, "int"), "int4": (4, "int")}[datatype]
    assert (scheme["num_bits"], scheme["type"]) == expected and scheme["symmetric"] and not scheme["dynamic"]
    assert scheme["strategy"] == {"tensor": "tensor", "head": "attn_head"}[strategy]


def test_weights_are_linked_and_what_people_edit_is_copied(tiny, tmp_path):
    source, out = saved(tiny(), tmp_path / "model"), tmp_path / "out"
    exported(tiny(), source, out, StaticQuantization("fp8", "tensor"))
    assert os.path.samefile(source / "model.safetensors", out / "model-weights.safetensors")
    assert not os.path.samefile(source / "tokenizer.json", out / "tokenizer.json")


def test_nothing_stays_behind_where_writing_fails(tiny, tmp_path, monkeypatch):
    source, out = saved(tiny(), tmp_path / "model"), tmp_path / "new" / "out"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        exported(tiny(), source, out, StaticQuantization("fp8", "tensor"))
    assert not list((tmp_path / "new").iterdir())


def test_a_folder_with_files_is_left_alone(tiny, tmp_path):
    source = saved(tiny(), tmp_path / "model")
    before = {path: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(OutputError, match="has files already"):
        exported(tiny(), source, source, StaticQuantization("fp8", "tensor"))
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_what_cannot_carry_scales_is_refused(tiny, tmp_path):
    source = saved(tiny(), tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        checkpoint_folder(str(source))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match=r"no model\.safetensors"):
        checkpoint_folder(str(tmp_path / "model.gguf"))


def test_names_that_engines_would_not_find_are_refused(tiny, tmp_path):
    quantization = StaticQuantization("fp8", "tensor")
    model = make("gemma4_text")
    with pytest.raises(UnsupportedModelError, match="read keys of other layers"):
        exported(model, saved(model, tmp_path / "shared"), tmp_path / "out", quantization)
    model = tiny()
    model.save_pretrained(tmp_path / "model", state_dict={f"other.{name}": x for name, x in model.state_dict().items()})
    with pytest.raises(UnsupportedModelError, match=r"no weights named model\.layers\.0\.self_attn"):
        exported(model, tmp_path / "model", tmp_path / "out", quantization)
    assert not (tmp_path / "out").exists()
