"""GSM8K (arXiv 2110.14168): problems in words whose answer is a number, after four that are solved."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.real_models import TEXTS
from benchmarks.tasks.caches import Kind
from benchmarks.tasks.generated import completions

NAME = "GSM8K"
PROBLEMS = TEXTS.parent / "tasks" / "gsm8k-test.jsonl.gz"
SHOTS, COUNT, NEW_TOKENS = 4, 48, 200
STOPS = ("\n\nQuestion:",)
ANSWER = re.compile(r"####\s*(-?[\d.,]+)")


def number(text: str) -> str | None:
    """The number behind the first `####` of an answer, without thousands separators; None where there is none."""
    found = ANSWER.search(text)
    return found[1].replace(",", "").rstrip(".") if found else None


def shown(problem: dict[str, str]) -> str:
    """A solved problem, in the form of lm-evaluation-harness."""
    return f"Question: {problem['question']}\nAnswer: {problem['answer']}"


def problems(path: Path, count: int) -> tuple[list[str], list[str | None]]:
    """Prompts, and the right numbers: the first problems of the file are those that are shown solved."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: SHOTS + count]
    solved = "\n\n".join(map(shown, rows[:SHOTS]))
    prompts = [f"{solved}\n\nQuestion: {row['question']}\nAnswer:" for row in rows[SHOTS:]]
    return prompts, [number(row["answer"]) for row in rows[SHOTS:]]


def passed(model: Any, tokenizer: Any, kind: Kind, count: int = COUNT) -> list[bool]:
    """Whether each problem's number is right."""
    prompts, expected = problems(PROBLEMS, count)
    answers = completions(model, tokenizer, prompts, kind, NEW_TOKENS, STOPS)
    return [number(answer) == right for answer, right in zip(answers, expected, strict=True)]
