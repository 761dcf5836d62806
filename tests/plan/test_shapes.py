"""Shapes read from a configuration alone."""

import pytest
import torch
from tests.families import REFUSED, make
from transformers import AutoConfig

from narrowkv import PackedCache
from narrowkv.errors import UnsupportedModelError
from narrowkv.integrations.probe import probe
from narrowkv.integrations.projections import ConstantKinds
from narrowkv.plan import SHAPES, read_shape


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text", "qwen2_5_vl", "gpt_oss", "qwen3_next", "smollm3"])
def test_layers_are_those_that_the_probe_finds(family, tmp_path):
    model = make(family)
    model.config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    cache = PackedCache(model, "int4", backend="torch")
    assert [(layer.kv_heads, layer.head_dim) for layer in shape.layers] == cache.shapes
    assert [layer.sliding_window for layer in shape.layers] == [layer.sliding_window for layer in cache.packed]
    assert shape.weights == sum(parameter.numel() for parameter in model.parameters())
    for layer, packed in zip(shape.layers, cache.packed, strict=True):
        assert packed.rope is None or layer.record == packed.rope.record


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "qwen3", "olmo2", "gemma3_text", "gpt_oss", "persimmon"])
@torch.no_grad()
def test_constants_are_those_that_running_the_model_finds(family, tmp_path):
    model = make(family)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    model.config.save_pretrained(tmp_path)
    facts, _ = probe(model)
    found = [fact.constants for fact in facts]
    expected = [ConstantKinds(*(part is not None for part in (one.keys, one.values, one.gain))) for one in found]
    assert [layer.constants for layer in read_shape(str(tmp_path)).layers] == expected


@pytest.mark.parametrize(
    "name", [name if name in ("llama-7b", "llama-3-8b") else pytest.param(name, marks=pytest.mark.wide) for name in SHAPES]
)
def test_named_shapes(name):
    shape = read_shape(name)
    assert shape.weights / 1e9 == pytest.approx(float(name.rpartition("-")[2].removesuffix("b")), rel=0.1)
    assert shape.dtype == torch.float16
    assert shape.weight_bytes(1) == 2 * shape.weights == 4 * shape.weight_bytes(1, bits=4)


def test_unplannable_models_are_refused_in_one_sentence(tmp_path):
    for family, (settings, words) in REFUSED.items():
        if family == "mamba":
            AutoConfig.for_model(family, **settings).save_pretrained(tmp_path)
            with pytest.raises(UnsupportedModelError, match=words):
                read_shape(str(tmp_path))
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="as a language model"):
        read_shape(str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="no file or folder"):
        read_shape(str(tmp_path / "nothing"))
    with pytest.raises(UnsupportedModelError, match="dtype"):
        read_shape("llama-7b", "int7")
