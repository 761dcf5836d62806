"""The plug-in in vLLM itself, which `make test-vllm` installs: against vLLM without it, and against `PackedCache`.

Each engine runs in a process of its own (scenes.py): what is registered with vLLM is registered for good.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from narrowkv import Calibration, PackedCache, calibrate, load_model
from narrowkv.attention.cpu.decode import fastest_kernel
from narrowkv.attention.cpu.int16 import STREAM_KERNELS
from narrowkv.cli.main import run
from narrowkv.evaluate import cut_windows
from narrowkv.evaluate.sources import read_text
from narrowkv.vllm import STRICT, VARIABLE

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; run `make test-vllm`")
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "src" / "narrowkv" / "models" / "demo"
CHUNK = 128


def lines(scene, model=DEMO, tables=None, strict=False, **options):
    """What a scene printed; raises AssertionError with what it said if it failed."""
    variables = {**os.environ, "NARROWKV_TEST_OPTIONS": json.dumps(options), "OMP_NUM_THREADS": "1", STRICT: str(int(strict))}
    variables.pop(VARIABLE, None)
    if tables is not None:
        variables[VARIABLE] = str(tables)
    command = [sys.executable, "-m", "tests.vllm.scenes", scene, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.splitlines()


def play(*args, **options):
    """What a scene found."""
    return json.loads(lines(*args, **options)[-1])


def refusal(scene="start", model=DEMO, tables=None, **options):
    """What a scene said that ended with an error."""
    with pytest.raises(AssertionError) as failed:
        play(scene, model, tables, **options)
    return str(failed.value)


def learned(model, tokenizer, folder, recipe="narrow3.0-equal"):
    batches = cut_windows(tokenizer, read_text("narrowkv://mix"), window=256, limit=8).split(4)
    calibrate(model, batches, recipe).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo():
    return load_model("narrowkv://demo", dtype="float32")


@pytest.fixture(scope="session")
def tables(tmp_path_factory, demo):
    return learned(*demo, tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="session")
def shared(tables):
    return play("sharing", tables=tables, strict=True)


def test_without_a_calibration_the_plug_in_does_nothing_and_with_one_a_cache_fits_five_times_the_tokens(tables):
    plain, packed = play("capacity"), play("capacity", tables=tables)
    assert packed["tokens"] > 5 * plain["tokens"]
    assert packed["texts"][0][:60] == plain["texts"][0][:60]  # the password


def read(model, tables, prompt, tokens):
    """Log-probabilities of what follows each token of a prompt, and the greedy answer to it, over a packed cache.

    Chunks of 128 tokens each attend to themselves exactly and to what is packed before them, as in vLLM.
    """
    cache, logits, written = PackedCache(model, Calibration.from_pretrained(tables)), [], []
    with torch.inference_mode():
        for chunk in torch.tensor([prompt]).split(CHUNK, dim=1):
            logits.append(model(chunk, past_key_values=cache).logits)
        last = logits[-1][0, -1]
        for _ in range(tokens):
            written.append(int(last.argmax()))
            last = model(torch.tensor([written[-1:]]), past_key_values=cache).logits[0, -1]
    return torch.cat(logits, dim=1)[0].log_softmax(-1), written


def assert_scored_as_by_a_packed_cache(model, tables, folder=DEMO):
    found = play("scores", folder, tables)
    expected, written = read(model, tables, found["prompt"], len(found["ids"]))
    expected = expected[:-1].gather(1, torch.tensor(found["prompt"])[1:, None])[:, 0]
    missed = (torch.tensor(found["prompt_logprobs"]) - expected).abs()
    assert missed.mean() < 1e-4 and found["ids"] == written


def test_scores_are_those_of_a_packed_cache(demo, tables):
    assert_scored_as_by_a_packed_cache(demo[0], tables)


def test_four_bits_are_those_of_a_packed_cache(demo, tmp_path):
    assert_scored_as_by_a_packed_cache(demo[0], learned(*demo, tmp_path, "narrow4-equal"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_start_says_which_kernel_reads(tables, monkeypatch, dtype):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    printed = lines("start", tables=tables, dtype=str(dtype).removeprefix("torch."))
    kernel = fastest_kernel(dtype, STREAM_KERNELS)
    (said,) = [line for line in printed if "NarrowKV packs" in line]
    assert said.endswith(f"NarrowKV packs keys and values (narrow3.0-equal), read in place by kernel {kernel}.")


def test_requests_at_once_answer_as_one_by_one(shared):
    assert [one["ids"] for one in shared["together"]] == [one["ids"] for one in shared["alone"]]


def test_prefixes_are_found_in_packed_pages(shared):
    assert shared["again"][0]["cached"] >= CHUNK
    assert shared["again"][0]["ids"] == shared["alone"][1]["ids"]


def test_several_answers_share_the_pages_of_a_prompt(shared):
    assert shared["several"] == shared["singles"]


def test_a_cancelled_request_leaves_the_others_alone(shared):
    finished, *after = shared["after"]
    assert finished["finished"] == ["stays"]
    assert [one["ids"] for one in after] == [one["ids"] for one in shared["alone"]]


def test_requests_that_are_preempted_answer_as_alone(tables):
    found = play("preemption", tables=tables, strict=True)
    assert found["preemptions"] > 0
    assert [one["ids"] for one in found["together"]] == [one["ids"] for one in found["alone"]]


def test_a_soak_with_cancels_and_preemption_answers_as_alone(tables):
    found = play("soak", tables=tables, strict=True)
    assert found["preemptions"] > 0 and 160 <= found["answered"] < 200 and found["compared"] >= 40
    assert found["differing"] == []
    assert found["growth"] < 1.06  # of stock vLLM in the same scene: 1.02 to 1.04


def test_drafts_of_n_grams_are_accepted_and_change_nothing(tables, shared):
    found = play("drafts", tables=tables, strict=True)
    assert found["accepted"] > 0
    assert [one["ids"] for one in found["together"]] == [one["ids"] for one in shared["alone"]]


def test_beams(tables):
    found = play("beams", tables=tables)
    assert found["runs"][0] == found["runs"][1] and len(found["runs"][0]) == 3


def add_adapter(model, folder):
    """Write a random adapter (LoRA) of all projections of attention, and add what it gives to what the model's own give."""
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith("_proj") and "self_attn" in name:
            down, up = torch.randn(4, module.in_features) / 16, torch.randn(module.out_features, 4)
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            module.register_forward_hook(lambda _, args, given, both=(up @ down).T: given + args[0] @ both)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": targets,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_requests_with_adapters_and_without_share_an_engine_but_no_pages(tables, tmp_path, monkeypatch):
    """An adapter in vLLM answers as the same one does in transformers, over a packed cache."""
    monkeypatch.setenv("NARROWKV_TEST_ADAPTER", str(tmp_path))
    base, adapted = (load_model("narrowkv://demo", dtype="float32")[0] for _ in range(2))
    add_adapter(adapted, tmp_path)
    found = play("adapters", tables=tables)["alone"]
    for one, model in zip(found, (base, adapted, base, adapted), strict=True):
        assert one["ids"] == read(model, tables, one["prompt"], len(one["ids"]))[1]
    assert found[0]["ids"] != found[1]["ids"] and found[2]["ids"] != found[3]["ids"]
    assert all(one["cached"] == 0 for one in found)
    strict = play("adapters", tables=tables, strict=True)
    for again, several in (("again", strict["alone"]), ("together", strict["alone"][1::2])):
        assert [one["ids"] for one in strict[again]] == [one["ids"] for one in several]
    assert all(one["cached"] >= CHUNK for one in strict["again"][2:])


def test_scales_of_an_export_are_read_by_vllm_without_the_plug_in(tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(["export", "narrowkv://demo", "--format", "vllm-scales", "--out", str(tmp_path / "out"), "--samples", "4"])
    assert not stop.value.code
    found, written = play("scales", tmp_path / "out"), load_file(tmp_path / "out" / "model-kv-scales.safetensors")
    names = [f"model.layers.{i}.self_attn.{side}" for i in range(4) for side in ("k_scale", "v_scale")]
    torch.testing.assert_close(
        torch.tensor(found["scales"]).flatten(), torch.stack([written[name].float().squeeze() for name in names])
    )
    assert "silent harbour" in found["text"]


def test_what_the_plug_in_cannot_serve_is_refused_at_start(tables, tmp_path, demo):
    assert "NarrowKV's pages have 128 tokens, and this vLLM's blocks 64" in refusal(tables=tables, block_size=64)
    assert "does not serve --kv-cache-dtype fp8" in refusal(tables=tables, kv_cache_dtype="fp8", dtype="bfloat16")
    unequal = tmp_path / "unequal"
    learned(*demo, unequal, "narrow3.0")
    assert "Recipe narrow3.0 has no pages of one size" in refusal(tables=unequal)
    assert "has no narrowkv.safetensors" in refusal(tables=tmp_path)


@pytest.mark.parametrize("changed", ["weights", "rotation"])
def test_another_model_is_refused(changed, tables, tmp_path, demo):
    model, tokenizer = load_model("narrowkv://demo", dtype="float32")
    if changed == "weights":
        model.model.layers[1].self_attn.q_proj.weight.data.mul_(-1)
        for part in model.parameters():
            part.data.add_(0.3)
    else:
        model.config.rope_parameters["rope_theta"] = 10_000.0
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    said = {"weights": "belongs to another model", "rotation": "rotates keys otherwise"}
    assert said[changed] in refusal(model=tmp_path, tables=tables)


@pytest.mark.parametrize(("config", "kind"), [(MistralConfig, MistralForCausalLM), (Gemma3TextConfig, Gemma3ForCausalLM)])
def test_windows_slide_over_packed_pages_as_over_a_packed_cache(config, kind, demo, tmp_path):
    """Pages behind a window of 100 tokens are vLLM's again: in every layer, or in all but the last, of another rotation."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 64}
    more = {"layer_types": [*["sliding_attention"] * 2, "full_attention"]} if config is Gemma3TextConfig else {}
    tokens = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = kind(
        config(**shape, **more, **tokens, num_key_value_heads=2, sliding_window=100, max_position_embeddings=2048)
    ).eval()
    for part in (model, demo[1]):
        part.save_pretrained(tmp_path)
    assert_scored_as_by_a_packed_cache(model, learned(model, demo[1], tmp_path / "tables"), tmp_path)


def test_latent_attention_is_refused(tables, demo, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 2048}
    latent = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    config = DeepseekV2Config(
        **shape, **latent, num_key_value_heads=2, first_k_dense_replace=2, architectures=["DeepseekV2ForCausalLM"]
    )
    for part in (config, demo[1]):
        part.save_pretrained(tmp_path)
    assert "does not pack latent attention" in refusal(model=tmp_path, tables=tables, load_format="dummy")


REAL = {name: os.environ.get(name) for name in ("NARROWKV_VLLM_MODEL", "NARROWKV_VLLM_TABLES")}


@pytest.mark.skipif(None in REAL.values(), reason=f"set {' and '.join(REAL)} to a model's folder and its calibration's")
def test_a_real_model_answers_as_without_the_plug_in():
    model, tables = REAL.values()
    plain, packed = play("real", model), play("real", model, tables)
    assert packed["tokens"] > 5 * plain["tokens"]
    assert [one["ids"] for one in packed["together"]] == [one["ids"] for one in packed["alone"]]
    answers = [one["text"].split()[0].strip(".") for one in packed["together"]]
    assert answers == [one["text"].split()[0].strip(".") for one in plain["together"]]
