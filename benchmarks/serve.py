"""What batches and prefixes of the server's engine gain on a model, as ratios within one run.

    python -m benchmarks.serve FOLDER --recipe int4

Rows: tokens per second of 8 rows over those of one. Requests: 8 of 1,000-token prompts and 128 new tokens at once, over one by
one, and over transformers' continuous batching in 16 bits. Turns: time to the first token of a second turn over that of the
first, behind a long prefix. Short: how long a short request waits behind a long prompt, in chunks.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.running import CLOCKS, write
from narrowkv import CacheGroup, Calibration, load_model
from narrowkv.evaluate.results import processor
from narrowkv.serve.engine import Engine, Limits
from narrowkv.serve.sampling import Sampling
from narrowkv.serve.sequences import Delta, Event, Job


class Run:
    """Jobs of one engine that is stepped by hand, so that other load on the machine is no part of it."""

    def __init__(self, engine: Engine, clock: Callable[[], float]):
        self.engine, self.clock = engine, clock
        self.left = self.tokens = 0

    def submit(self, ids: list[int], tokens: int) -> None:
        """Queue a greedy job."""
        job = Job(ids, "", Sampling(temperature=0.0), tokens, ignore_eos=True)
        job.put = self._take
        self.left += 1
        self.engine.submit(job)

    def _take(self, event: Event) -> None:
        assert isinstance(event, Delta)
        self.tokens += 1
        self.left -= event.finish is not None

    def finish(self) -> float:
        """Seconds until all jobs are done."""
        begun = self.clock()
        while self.left:
            self.engine.step()
        return self.clock() - begun

    def first_token(self) -> float:
        """Seconds until the next token of any job."""
        begun, before = self.clock(), self.tokens
        while self.tokens == before:
            self.engine.step()
        return self.clock() - begun


def decode_rows(engine: Engine, ids: list[int], clock: Callable[[], float], steps: int = 5) -> dict[str, float]:
    """Tokens per second of 1, 2, 4 and 8 rows behind a prompt, best of a few steps."""
    cache = copy.deepcopy(engine.empty)
    for part in torch.tensor([ids]).split(engine.limits.chunk, dim=1):
        engine.model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    found = {}
    for rows in (1, 2, 4, 8):
        caches = [copy.deepcopy(cache) for _ in range(rows)]
        group: Any = CacheGroup(caches) if rows > 1 else caches[0]
        times = []
        for _ in range(steps):
            begun = clock()
            engine.model(input_ids=torch.full((rows, 1), 5), past_key_values=group)
            times.append(clock() - begun)
        found[f"tokens per second of {rows} rows"] = rows / min(times)
    found["8 rows over one"] = found["tokens per second of 8 rows"] / found["tokens per second of 1 rows"]
    return found


def turns(fresh: Callable[..., Run], prefix: list[int], question: list[int]) -> dict[str, float]:
    """A second turn behind a long prefix, and a short request that comes once a long prompt is being read."""
    run = fresh()
    run.submit(prefix, 1)
    first = run.first_token()
    run.submit([*prefix, *question], 1)
    second = run.first_token()
    chunk = first / -(-len(prefix) // run.engine.limits.chunk)
    run = fresh(cache_bytes=0)
    run.submit(prefix, 1)
    run.engine.step()
    run.submit(question, 1)
    return {
        "seconds to the first token of a first turn": first,
        "second turn over the first": second / first,
        "wait of a short request behind a long prompt, in chunks": run.first_token() / chunk,
    }


def batched(model: Any, prompts: list[list[int]], tokens: int, clock: Callable[[], float]) -> float:
    """Seconds that transformers' continuous batching takes for all prompts, in the model's dtype."""
    greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    begun = clock()
    with torch.inference_mode(False):  # it computes in a thread of its own
        found = model.generate_batch(inputs=prompts, generation_config=greedy, progress_bar=False)
    assert all(len(one.generated_tokens) == tokens for one in found.values())
    return clock() - begun


def measure(model: Any, tokenizer: Any, source: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """The ratios that are wanted."""
    clock, scale = CLOCKS[arguments.clock], arguments.scale
    torch.manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    drawn = lambda n: torch.randint(10, vocabulary - 10, (max(int(n * scale), 8),)).tolist()  # noqa: E731
    fresh = lambda **limits: Run(Engine(model, tokenizer, source, Limits(**limits)), clock)  # noqa: E731
    found: dict[str, float] = {}
    if "rows" in arguments.parts:
        found |= decode_rows(fresh().engine, drawn(1000), clock)
    if "requests" in arguments.parts:
        prompts, tokens = [drawn(1000) for _ in range(8)], max(int(128 * scale), 2)
        apart = 0.0
        run = fresh()
        for ids in prompts:
            run.submit(ids, tokens)
            apart += run.finish()
        run = fresh()
        for ids in prompts:
            run.submit(ids, tokens)
        together = run.finish()
        found["8 requests at once over one after another"] = apart / together
        found["8 requests at once over transformers' generate_batch"] = batched(model, prompts, tokens, clock) / together
    if "turns" in arguments.parts:
        found |= turns(fresh, drawn(4000), drawn(20 / scale))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--calibration")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clock", choices=CLOCKS, default="processor", help="processor: seconds that other load leaves alone")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--parts", default="rows,requests,turns")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, arguments.dtype)
    source = Calibration.from_pretrained(arguments.calibration) if arguments.calibration else arguments.recipe
    with torch.inference_mode():
        found = measure(model, tokenizer, source, arguments)
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    print(f"{processor()}, {torch.get_num_threads()} threads, {arguments.clock} clock, {model.dtype}, {source}")
    settings = {
        "model": Path(arguments.model).name,
        "source": str(source),
        "dtype": str(model.dtype),
        "clock": arguments.clock,
    }
    write(arguments.json, [{"what": name, "value": value} for name, value in found.items()], **settings)


if __name__ == "__main__":
    main()
