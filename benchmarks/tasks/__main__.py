"""Tasks on real models next to the model's own cache: `python -m benchmarks.tasks MODEL [MODEL ...] --out results/tasks`.

HumanEval (60 problems), GSM8K (48) and calls of tools in a third turn (30) are answered greedily, for models with a chat
template. 20 passwords are asked for, and 40 lines of source code completed, behind each of two prompts of 4,096, 8,192 and
16,384 tokens; a prompt is read once, and its keys and values packed by every recipe. All are scored as in use: a prompt
attends exactly to itself, what follows to the packed prompt. Printed is how many answers are right, and for each recipe those
that it alone loses and wins against the model's own cache, with a 95% interval of the difference (bootstrap over pairs).

transformers' QuantizedCache is measured where quanto and hqq are installed. Tables are those of `benchmarks.real_models
--calibrations FOLDER`, or learned from the built-in mix anew. There is one file for each model, which goes on where it was
interrupted. HumanEval runs what the model writes, with your rights, and so takes --run-generated-code.
"""

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.real_models import Subject, load
from benchmarks.tasks import completion, gsm8k, humaneval, retrieval, tool_calls
from benchmarks.tasks.caches import PEERS, Kind
from narrowkv import get_recipe
from narrowkv.evaluate.results import ResultFile
from narrowkv.evaluate.tasks import BASELINE

KIND = "real-tasks"
RECIPES = ("narrow4", "narrow3", "narrow2", "nuq4-1%", "nuq3-1%", "nuq2-1%", "kivi-4", "kivi-2", "int4")
ANSWERED = (humaneval.NAME, gsm8k.NAME, tool_calls.NAME)
LONG = {retrieval.NAME: retrieval.outcomes, completion.NAME: completion.outcomes}
LENGTHS = (4096, 8192, 16_384)
MODULES = {"quanto": "optimum", "hqq": "hqq"}  # of peers
RESAMPLES = 10_000


def interval(differences: Sequence[int]) -> tuple[int, int]:
    """The 95% interval of a sum of paired differences of -1, 0 or 1 over problems drawn anew."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(differences)
    sums = values[torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)].sum(1).double()
    low, high = sums.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return round(low), round(high)


def answered(task: str, subject: Subject, kind: Kind) -> dict[str, list[bool]]:
    """Which problems of a task are right, and whatever else is counted."""
    if task == tool_calls.NAME:
        right, valid = tool_calls.replies(subject.model, subject.tokenizer, kind)
        return {"passed": right, "valid": valid}
    module = humaneval if task == humaneval.NAME else gsm8k
    return {"passed": module.passed(subject.model, subject.tokenizer, kind)}


def cells(options: argparse.Namespace, has_template: bool) -> Iterator[tuple[str, int | None]]:
    """The tasks that are asked for, and the lengths of their prompts."""
    for task in ANSWERED if has_template else ():
        if task in options.tasks and (task != humaneval.NAME or options.run_generated_code):
            yield task, None
    for task in LONG:
        yield from ((task, length) for length in options.lengths if task in options.tasks)


def kinds_of(subject: Subject, options: argparse.Namespace) -> dict[str, Kind]:
    """The caches that are compared, the model's own first."""
    found: dict[str, Kind] = {BASELINE: None}
    found |= subject.tables("mix", [get_recipe(name) for name in options.recipes], options.calibrations)
    installed = {name: peer for name, peer in PEERS.items() if find_spec(MODULES[peer.backend])}
    for name in PEERS.keys() - installed.keys():
        print(f"{name} is left out: its library is not installed.")
    return found | (installed if options.peers else {})


def run(name: str, options: argparse.Namespace) -> ResultFile:
    """All rows that a model's file lacks."""
    model = Path(name).name
    settings = {"model": model, "dtype": options.dtype}
    results = ResultFile(options.out / f"{model}.json", KIND, f"python -m benchmarks.tasks {model}", settings)
    subject = load(name, dtype=options.dtype)
    kinds = kinds_of(subject, options)
    for task, length in cells(options, bool(subject.tokenizer.chat_template)):
        missing = {kind: kinds[kind] for kind in kinds if results.find(task=task, length=length, recipe=kind) is None}
        key = {"task": task, "length": length}
        if length is None:
            for kind, source in missing.items():
                found = answered(task, subject, source)
                results.add({**key, "recipe": kind, "right": sum(found["passed"]), **found})
        elif missing:
            for kind, passed in LONG[task](subject.model, subject.tokenizer, length, missing).items():
                results.add({**key, "recipe": kind, "right": sum(passed), "passed": passed})
    return results


def show(results: ResultFile) -> None:
    """Print what a file holds."""
    for row in results.rows:
        exact = results.find(task=row["task"], length=row["length"], recipe=BASELINE)
        assert exact is not None
        differences = [ours - theirs for ours, theirs in zip(row["passed"], exact["passed"], strict=True)]
        low, high = interval(differences)
        lost, won = differences.count(-1), differences.count(1)
        what = f"{results.path.stem:20} {row['task']:11} {row['length'] or '':6} {row['recipe']:11}"
        passed = f"{sum(row['passed'])} of {len(differences)}"
        print(f"{what} {passed}, {lost} lost, {won} won, net {won - lost} [{low}, {high}]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models, or hub ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=(*ANSWERED, *LONG), default=(*ANSWERED, *LONG))
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of long prompts")
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="transformers' QuantizedCache too"
    )
    parser.add_argument("--calibrations", type=Path, help="folder where tables are stored")
    parser.add_argument("--run-generated-code", action="store_true", help="run what the model writes, with your rights")
    options = parser.parse_args()
    for name in options.models:
        show(run(name, options))


if __name__ == "__main__":
    main()
