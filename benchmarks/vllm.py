"""What the plug-in gives in vLLM on a CPU, against vLLM without it: tokens in 1 GiB, and steps of four long requests.

Run in the environment of `make test-vllm`: `build/vllm/bin/python -m benchmarks.vllm MODEL --calibration TABLES`. Engines run
one after the other, each in a process of its own, several times in turn; of each the fastest median counts. The time of a step
is that of the process (`cpu`, all threads added up) and of the clock (`wall`), after prompts were read.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from narrowkv.vllm import VARIABLE

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def measure(model: str, requests: int, length: int, steps: int, dtype: str) -> dict[str, Any]:
    """Tokens in 1 GiB, and milliseconds of a step in which each request gets a token; in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=2**30, max_model_len=length + 256, max_num_seqs=requests
    )
    cache, engine = llm.llm_engine.vllm_config.cache_config, llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=steps + 20, ignore_eos=True)
    for i in range(requests):
        ids = [100 + (37 * i + 7919 * j) % 20_000 for j in range(length)]
        engine.add_request(str(i), {"prompt_token_ids": ids}, sampling)
    begun: set[str] = set()
    while len(begun) < requests:
        begun |= {found.request_id for found in engine.step()}
    cpu, wall = [], []
    for _ in range(steps):
        before = time.process_time(), time.perf_counter()
        engine.step()
        cpu.append(time.process_time() - before[0])
        wall.append(time.perf_counter() - before[1])
    return {
        "tokens_in_a_gib": (cache.num_gpu_blocks or 0) * cache.block_size,
        "cpu_ms": 1e3 * statistics.median(cpu),
        "wall_ms": 1e3 * statistics.median(wall),
    }


def run(arguments: argparse.Namespace, calibration: str | None) -> dict[str, Any]:
    """`measure` in a process of its own."""
    variables = {**os.environ, **SETTINGS} | ({VARIABLE: calibration} if calibration else {})
    options = [f"--{name}={getattr(arguments, name)}" for name in ("requests", "length", "steps", "dtype")]
    command = [sys.executable, "-m", "benchmarks.vllm", arguments.model, "--alone", *options]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--length", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--alone", action="store_true", help="one engine in this process, as the environment has it")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.model, arguments.requests, arguments.length, arguments.steps, arguments.dtype)))
        return
    rounds = [[run(arguments, tables) for tables in (None, arguments.calibration)] for _ in range(arguments.rounds)]
    stock, packed = ({key: min(one[key] for one in side) for key in side[0]} for side in zip(*rounds, strict=True))
    ratios = {key: packed[key] / stock[key] for key in stock}
    print(json.dumps({"stock": stock, "packed": packed, "ratio": ratios, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
