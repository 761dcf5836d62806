"""HumanEval by recipe next to the model's own cache: `python -m benchmarks.humaneval MODEL --out results/humaneval`.

The first problems of HumanEval (arXiv 2107.03374; from NARROWKV_ASSETS, or as --problems says) are completed greedily, as in
use: a prompt attends exactly to itself, what is generated to the packed prompt. Printed is how many pass, and for each recipe
the problems that it alone loses and wins against the model's own cache, with a 95% interval of the difference (bootstrap over
problems). Tables are those of `benchmarks.real_models --calibrations FOLDER`, or learned from the built-in mix anew.

What the model writes is run: in a process of its own without the environment, in an empty folder, with a limit of memory and
time, but with your rights. So it takes --run-generated-code.
"""

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_models import TEXTS, load
from narrowkv import PackedCache, get_recipe
from narrowkv.evaluate.results import ResultFile
from narrowkv.evaluate.tasks import BASELINE

KIND = "humaneval"
PROBLEMS = TEXTS.parent / "tasks" / "HumanEval.jsonl.gz"
RECIPES = ("narrow4", "narrow3", "narrow2")
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
NEW_TOKENS, BATCH = 256, 12
SECONDS, MEMORY = 10, 2**31
RESAMPLES = 10_000


def completions(model: Any, tokenizer: Any, prompts: Sequence[str], source: Any) -> list[str]:
    """Greedy completions of prompts, cut where the function ends. source: a recipe or a calibration, None for the model's own
    cache.
    """
    found = []
    for start in range(0, len(prompts), BATCH):
        inputs = tokenizer(list(prompts[start : start + BATCH]), return_tensors="pt", padding=True, padding_side="left")
        cache = {} if source is None else {"past_key_values": PackedCache(model, source)}
        ids = model.generate(
            **inputs,
            **cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            stop_strings=list(STOPS),
            tokenizer=tokenizer,
        )
        new = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [min((text.split(stop)[0] for stop in STOPS), key=len) for text in new]
    return found


def limited() -> None:
    """Limit memory and processor time of the process that is about to start."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def passes(problem: dict[str, str], completion: str) -> bool:
    """Whether a completion passes the problem's tests, run in a process of its own."""
    program = f"{problem['prompt'].strip()}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            ran = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                timeout=2 * SECONDS,
                preexec_fn=limited,
                capture_output=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return ran.returncode == 0


def interval(differences: Sequence[int]) -> tuple[int, int]:
    """The 95% interval of a sum of paired differences of -1, 0 or 1 over problems drawn anew."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(differences)
    sums = values[torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)].sum(1).double()
    low, high = sums.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return round(low), round(high)


def run(name: str, options: argparse.Namespace) -> ResultFile:
    """All rows that a model's file lacks."""
    model = Path(name).name
    with gzip.open(options.problems, "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines][: options.limit]
    settings = {"model": model, "dtype": options.dtype, "limit": options.limit, "new_tokens": NEW_TOKENS}
    results = ResultFile(options.out / f"{model}.json", KIND, f"python -m benchmarks.humaneval {model}", settings)
    missing = [recipe for recipe in (BASELINE, *options.recipes) if results.find(recipe=recipe) is None]
    if not missing:
        return results
    subject = load(name, dtype=options.dtype)
    wanted = [get_recipe(recipe) for recipe in missing if recipe != BASELINE]
    sources = subject.tables("mix", wanted, options.calibrations)
    prompts = [problem["prompt"].strip() for problem in problems]
    for recipe in missing:
        texts = completions(subject.model, subject.tokenizer, prompts, sources.get(recipe))
        passed = [passes(problem, text) for problem, text in zip(problems, texts, strict=True)]
        results.add({"recipe": recipe, "passed": passed})
    return results


def show(results: ResultFile) -> None:
    """Print what a file holds."""
    exact = results.find(recipe=BASELINE)
    assert exact is not None
    for row in results.rows:
        differences = [ours - theirs for ours, theirs in zip(row["passed"], exact["passed"], strict=True)]
        low, high = interval(differences)
        lost, won = differences.count(-1), differences.count(1)
        passed = f"{sum(row['passed'])} of {len(differences)} pass"
        print(f"{results.path.stem:20} {row['recipe']:10} {passed}, {lost} lost, {won} won, net {won - lost} [{low}, {high}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models, or hub ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run-generated-code", action="store_true", help="run what the model writes, with your rights")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--limit", type=int, default=60, help="problems")
    parser.add_argument("--problems", type=Path, default=PROBLEMS)
    parser.add_argument("--calibrations", type=Path, help="folder where tables are stored")
    options = parser.parse_args()
    if not options.run_generated_code:
        parser.error("what the model writes would be run with your rights; say --run-generated-code if it may.")
    for name in options.models:
        show(run(name, options))


if __name__ == "__main__":
    main()
