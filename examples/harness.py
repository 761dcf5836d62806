"""lm-evaluation-harness on a packed cache: `pip install lm-eval`, then `python examples/harness.py [--rows 40] [--json FILE]`.

The harness scores log-likelihoods by calling `model(input_ids)` without a cache. `make_default(..., scoring=True)` lets such
calls see quantized keys and values, so any of its tasks measures the cache, with no change in the harness. Here a local task
on the built-in model: a password is stated in a text, and 400 tokens later must be the most likely of four.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from narrowkv import calibrate, disable, load_model, make_default
from narrowkv.evaluate import cut_windows
from narrowkv.evaluate.results import write_result
from narrowkv.evaluate.retrieval import ADJECTIVES, NAMES, NOUNS, fact_parts
from narrowkv.evaluate.sources import read_text

MODEL, RECIPE, CONTEXT = "narrowkv://demo", "nuq3-1%", 400


def make_rows(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Questions: a text that tells a password, and four choices of which the first to be given is right."""
    draw = random.Random(0)
    fillers = cut_windows(tokenizer, read_text("narrowkv://held-out"), CONTEXT, count)
    rows = []
    for filler in fillers:
        people, words = draw.sample(NAMES, 4), [f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}" for _ in range(4)]
        context = " ".join("".join(fact_parts(*pair)) for pair in zip(people, words, strict=True))
        asked = draw.randrange(4)
        question = f"{context} {tokenizer.decode(filler)} {fact_parts(people[asked], '')[0]}"
        rows.append({"text": question, "search_space": words, "answer": asked})
    return rows


def score(model: Any, tokenizer: Any, rows: Path) -> float:
    """The harness's accuracy on the rows of a JSON-lines file."""
    task = {
        "task": "passwords",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "search_space",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4, max_length=1024)
    known = TaskManager(include_defaults=False)  # the harness's own tasks, thousands of files, are not read
    results = lm_eval.simple_evaluate(model=harness, tasks=[task], task_manager=known, bootstrap_iters=0, verbosity="ERROR")
    return float(results["results"]["passwords"]["acc,none"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = load_model(MODEL)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "passwords.jsonl"
        rows.write_text("\n".join(json.dumps(row) for row in make_rows(tokenizer, options.rows)), encoding="utf-8")
        found["16 bit"] = score(model, tokenizer, rows)
        calibration = calibrate(model, cut_windows(tokenizer, read_text("narrowkv://train"), 512, 8), RECIPE)
        for name, source in ((RECIPE, calibration), ("int2", "int2")):
            make_default(model, source, scoring=True)
            found[name] = score(model, tokenizer, rows)
        disable(model)
    for name, accuracy in found.items():
        print(f"{name:>8}  {accuracy:.0%}")
    if options.json:
        metrics = [{"recipe": name, "accuracy": accuracy} for name, accuracy in found.items()]
        write_result(
            options.json, "harness", "python examples/harness.py", {"rows": options.rows, "context": CONTEXT}, metrics
        )


if __name__ == "__main__":
    main()
