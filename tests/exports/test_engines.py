"""Engines read what was exported, where they are installed: `make test-exports` installs compressed-tensors and ONNX Runtime
GenAI.
"""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from narrowkv.cli.main import run

PROMPT = "The password of Matilda is silent harbour. The password of Matilda is"
ANSWER = "silent harbour"
DEMO = "narrowkv://demo"


def export(kind, out, *options):
    with pytest.raises(SystemExit) as stop:
        run(["export", DEMO, "--format", kind, "--out", str(out), "--samples", "4", "--window", "256", *options])
    assert not stop.value.code
    return out


@pytest.mark.parametrize(("datatype", "strategy"), [("fp8", "tensor"), ("int8", "head"), ("int8", "tensor")])
def test_compressed_tensors(tmp_path, datatype, strategy):
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export("compressed-tensors", tmp_path / "out", "--datatype", datatype, "--strategy", strategy)
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    parameters, scales = dict(model.named_parameters()), load_file(out / "model-kv-scales.safetensors")
    assert len(scales) == 2 * model.config.num_hidden_layers
    for name, scale in scales.items():
        assert torch.equal(parameters[name], scale.to(parameters[name].dtype))
    args = model.model.layers[0].self_attn.quantization_scheme.input_activations
    assert (args.num_bits, args.strategy) == (8, {"head": "attn_head"}.get(strategy, strategy))
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert ANSWER in tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(("datatype", "strategy"), [("int8", "channel"), ("int4", "channel"), ("int8", "tensor")])
def test_onnxruntime_genai(tmp_path, datatype, strategy):
    genai = pytest.importorskip("onnxruntime_genai", exc_type=ImportError)
    from narrowkv.integrations.models import model_folder

    folder = export("onnxruntime-genai", tmp_path / "scales", "--datatype", datatype, "--strategy", strategy)
    scales = folder / "kv_scales.json"
    scheme = f"kv_cache_quant_scheme={datatype}_per_{strategy}"
    build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model_folder(DEMO), "-o", tmp_path / "onnx"]
    build += ["-p", "fp32", "-e", "cpu", "-c", tmp_path / "cache", "--extra_options", scheme, f"kv_cache_scale_file={scales}"]
    done = subprocess.run([str(part) for part in build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = genai.Model(str(tmp_path / "onnx"))
    tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
    tokens = tokenizer.encode(PROMPT)
    parameters.set_search_options(max_length=len(tokens) + 12, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    assert ANSWER in tokenizer.decode(generator.get_sequence(0)[len(tokens) :])
