"""Files of tasks that a user has: JSON lines of LongBench or of RULER, distinguished by their fields.

LongBench (arXiv 2308.14508): `context`, `input` (the question), `answers` (a list), `dataset`; other fields are left alone.
RULER (arXiv 2404.06654): `input` (the whole prompt), `outputs` (a list); where the name of the file or of its folder begins
with `qa` one of the outputs is enough, elsewhere each counts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowkv.errors import TextError
from narrowkv.evaluate import task_metrics
from narrowkv.evaluate.task_metrics import Metric

LONGBENCH: dict[str, Metric] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), task_metrics.f1),
    "triviaqa": task_metrics.first_line_f1,
    **dict.fromkeys(("passage_retrieval_en", "passage_count"), task_metrics.number),
}


@dataclass(frozen=True)
class Question:
    """line: of the file. prompt: all that the model reads. accepted: answers. cut: whether the middle of a prompt that is too
    long may be left out, as LongBench does.
    """

    line: int
    prompt: str
    accepted: tuple[str, ...]
    metric: Metric
    cut: bool


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first questions of a file. Raises TextError, which names file and line, for what is neither of the two formats."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"Cannot read {path} ({error}); give a file of JSON lines of LongBench or RULER.") from error
    filled = [(i, line) for i, line in enumerate(lines, 1) if line.strip()][:limit]
    if not filled:
        raise TextError(f"{path} is empty; give a file of JSON lines of LongBench or RULER.")
    return [_question(path, i, line) for i, line in filled]


def _question(path: Path, line: int, text: str) -> Question:
    where = f"{path}, line {line}"
    try:
        row: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise TextError(f"{where} is not JSON ({error}); each line is one object of LongBench or RULER.") from error
    fields = set(row) if isinstance(row, dict) else set()
    if {"context", "input", "answers", "dataset"} <= fields:
        return _of_longbench(where, line, row)
    if {"input", "outputs"} <= fields:
        of_qa = any(name.startswith("qa") for name in (path.name, path.parent.name))
        metric = task_metrics.any_found if of_qa else task_metrics.all_found
        return Question(line, _text(where, row, "input"), _texts(where, row, "outputs"), metric, cut=False)
    raise TextError(
        f"{where} has neither the fields of LongBench (context, input, answers, dataset) nor those of RULER (input, outputs)."
    )


def _of_longbench(where: str, line: int, row: dict[str, Any]) -> Question:
    metric = LONGBENCH.get(_text(where, row, "dataset"))
    if metric is None:
        raise TextError(
            f"{where}: LongBench's {row['dataset']} is scored by a measure that is not here; there are {', '.join(LONGBENCH)}."
        )
    prompt = f"{_text(where, row, 'context')}\n\nQuestion: {_text(where, row, 'input')}\nAnswer:"
    return Question(line, prompt, _texts(where, row, "answers"), metric, cut=True)


def _text(where: str, row: dict[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise TextError(f"{where}: {field} is text, not {type(row[field]).__name__}.")
    return row[field]


def _texts(where: str, row: dict[str, Any], field: str) -> tuple[str, ...]:
    answers = row[field]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise TextError(f"{where}: {field} is a list of at least one text.")
    return tuple(answers)
