"""Hundreds of mixed requests to `narrowkv serve`, a fifth cancelled, a tenth malformed: no crash, no leak, same answers.

    python -m benchmarks.soak narrowkv://demo --requests 500 --clients 16

Greedy answers are compared with those of the same requests sent one by one afterwards. Where they differ, the two most likely
tokens at the first difference have to be nearly equal: several rows are rounded otherwise than one. In float32, since for
products of 16 bits torch stores code for each length of a chunk: memory then grows until each was met once.
"""

import argparse
import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil

from benchmarks.running import write

BOUND = 0.05  # nats between the two most likely tokens, below which rounding may decide
WARM, FLAT = 100, 1.03  # requests before memory is looked at, and by how much it may grow after them
TEXT = "She had been looking at the sea for a long time, and it seemed to her that the ships were going nowhere at all. "
MALFORMED: list[dict[str, Any]] = [
    {"messages": []},
    {"temperature": 9},
    {"model": "../../etc/passwd"},
    {"max_tokens": 10**9},
    {"logit_bias": {"1": 1}},
    {"n": 1000},
    {"stop": [""]},
]


@dataclass
class Found:
    """What the requests came to."""

    done: int = 0
    cancelled: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    greedy: list[tuple[dict[str, Any], list[Any]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, process: psutil.Process) -> None:
        """One more request has ended."""
        with self.lock:
            setattr(self, name, getattr(self, name) + 1)
            self.memory.append(process.memory_info().rss)


def start(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """The server's process and its address."""
    source = ["--calibration", arguments.calibration] if arguments.calibration else ["--recipe", arguments.recipe]
    command = [sys.executable, "-m", "narrowkv", "serve", arguments.model, *source, "--port", "0", "--name", "model"]
    process = subprocess.Popen([*command, *arguments.options.split()], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.search(r"http://\S+", line):
            threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True).start()
            return process, found[0]
    raise SystemExit("The server did not start.")


def request(draw: random.Random) -> dict[str, Any]:
    """A request of some kind; prompts share beginnings."""
    begin = draw.choice([0, 1, 2]) * 37
    words = (TEXT * 12)[begin : begin + draw.randint(20, 900)]
    body: dict[str, Any] = {
        "model": "model",
        "max_tokens": draw.randint(1, 40),
        "messages": [{"role": "user", "content": words}],
    }
    if draw.random() < 0.6:
        return {**body, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    return {**body, "temperature": 1.0, "top_p": 0.9, "n": draw.randint(1, 3), "presence_penalty": 0.5}


def run(client: openai.OpenAI, seed: int, found: Found, process: psutil.Process) -> None:
    """One request from its beginning to its end, or to where it is left."""
    draw = random.Random(seed)
    body, fate = request(draw), draw.random()
    try:
        if fate < 0.1:
            try:
                client.chat.completions.create(**{**body, **draw.choice(MALFORMED)})
                found.failures.append("a malformed request was answered")
            except openai.APIStatusError as error:
                if not 400 <= error.status_code < 500:
                    found.failures.append(f"a malformed request was given {error.status_code}")
            return found.count("refused", process)
        if fate < 0.2:
            stream = client.chat.completions.create(stream=True, **{**body, "max_tokens": 400})
            next(iter(stream))
            stream.close()
            return found.count("cancelled", process)
        if fate < 0.3:
            with contextlib.suppress(openai.APITimeoutError):
                client.with_options(timeout=0.2).chat.completions.create(**{**body, "max_tokens": 400})
            return found.count("cancelled", process)
        if draw.random() < 0.5:
            parts = list(client.chat.completions.create(stream=True, **body))
            tokens = [token for part in parts for one in part.choices if one.logprobs for token in one.logprobs.content or ()]
        else:
            answer = client.chat.completions.create(**body)
            tokens = list(answer.choices[0].logprobs.content or ()) if answer.choices[0].logprobs else []
        if body["temperature"] == 0:
            with found.lock:
                found.greedy.append((body, tokens))
        found.count("done", process)
    except openai.OpenAIError as error:
        found.failures.append(f"{type(error).__name__}: {error}")


def differences(client: openai.OpenAI, greedy: list[tuple[dict[str, Any], list[Any]]]) -> tuple[int, list[str]]:
    """How many answers differ from the same request alone, and those whose first difference was not nearly a tie."""
    different, wrong = 0, []
    for body, tokens in greedy:
        alone = client.chat.completions.create(**body).choices[0].logprobs.content
        pairs = list(zip(tokens, alone, strict=False))
        first = next((pair for pair in pairs if pair[0].token != pair[1].token), None)
        if first is None:
            continue
        different += 1
        top = [one.logprob for one in first[1].top_logprobs]
        if top[0] - top[1] > BOUND:
            wrong.append(f"{first[0].token!r} for {first[1].token!r}, {top[0] - top[1]:.3f} nats apart")
    return different, wrong


def main() -> None:
    """Run the soak and print what was found; exit status 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="narrowkv://demo")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--calibration")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--compared", type=int, default=60, help="greedy answers that are sent again alone")
    parser.add_argument("--options", default="--cache-bytes 5000000 --dtype float32", help="further options of narrowkv serve")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    server, url = start(arguments)
    process, found, begun = psutil.Process(server.pid), Found(), time.monotonic()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=300)
    try:
        with ThreadPoolExecutor(arguments.clients) as pool:
            list(pool.map(lambda seed: run(client, seed, found, process), range(arguments.requests)))
        seconds = time.monotonic() - begun
        different, wrong = differences(client, found.greedy[: arguments.compared])
        if server.poll() is not None:
            found.failures.append("the server has ended")
    finally:
        server.terminate()
        status = server.wait(60)
    warm, last = found.memory[min(WARM, len(found.memory) // 2) :], found.memory[-len(found.memory) // 10 :]
    growth = (sum(last) / len(last)) / max(warm[: len(last)], default=1)
    results = {
        "requests": arguments.requests,
        "answered": found.done,
        "cancelled": found.cancelled,
        "refused": found.refused,
        "seconds": round(seconds, 1),
        "memory_growth": round(growth, 4),
        "megabytes": [round(found.memory[i * (len(found.memory) - 1) // 10] / 1e6) for i in range(11)],
        "compared": min(len(found.greedy), arguments.compared),
        "different": different,
        "wrong": wrong,
        "failures": found.failures,
        "exit_status": status,
    }
    print(json.dumps(results, indent=2))
    write(arguments.json, [results], model=Path(arguments.model).name, clients=arguments.clients, options=arguments.options)
    enough = len(found.memory) > 2 * WARM  # memory of fewer requests says nothing
    if wrong or found.failures or status or (enough and growth > FLAT):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
