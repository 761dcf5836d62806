"""Files of LongBench and RULER: distinguished by their fields; what is neither is refused by file and line."""

import json

import pytest

from narrowkv.errors import TextError
from narrowkv.evaluate import task_metrics
from narrowkv.evaluate.task_files import read_questions

LONGBENCH = {"context": "A text.", "input": "Who?", "answers": ["Me"], "dataset": "qasper", "length": 2, "_id": "x"}
RULER = {"index": 0, "input": "Who? Answer:", "outputs": ["me", "you"], "length": 9}


def written(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_both_formats_are_read(tmp_path):
    first, second = read_questions(written(tmp_path / "x.jsonl", LONGBENCH, {**LONGBENCH, "dataset": "passage_count"}))
    assert (first.line, second.line) == (1, 3) and first.prompt == "A text.\n\nQuestion: Who?\nAnswer:"
    assert (first.metric, second.metric) == (task_metrics.f1, task_metrics.number) and first.accepted == ("Me",)
    (retrieved,) = read_questions(written(tmp_path / "niah" / "validation.jsonl", RULER, "{"), limit=1)
    assert retrieved.prompt == "Who? Answer:" and retrieved.metric is task_metrics.all_found
    (asked,) = read_questions(written(tmp_path / "qa_1" / "validation.jsonl", RULER))
    assert asked.metric is task_metrics.any_found and asked.accepted == ("me", "you")


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("{", "not JSON"),
        ("[1]", "neither the fields"),
        ({"input": "x"}, "neither the fields"),
        ({**RULER, "outputs": "x"}, "outputs is a list"),
        ({**RULER, "outputs": []}, "outputs is a list"),
        ({**RULER, "input": 3}, "input is text"),
        ({**LONGBENCH, "answers": [3]}, "answers is a list"),
        ({**LONGBENCH, "dataset": "gov_report"}, "gov_report is scored by a measure that is not here"),
    ],
)
def test_errors_name_file_and_line(tmp_path, row, cause):
    with pytest.raises(TextError, match=cause) as caught:
        read_questions(written(tmp_path / "x.jsonl", LONGBENCH, row))
    assert "x.jsonl, line 3" in str(caught.value)


def test_a_file_that_is_empty_or_absent_is_refused(tmp_path):
    with pytest.raises(TextError, match="is empty"):
        read_questions(written(tmp_path / "x.jsonl", ""))
    with pytest.raises(TextError, match="Cannot read"):
        read_questions(tmp_path / "y.jsonl")
