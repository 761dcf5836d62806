"""Tasks: a row for each task, length, depth and recipe, each measured once."""

import json

import pytest
from tests.conftest import make_tiny
from tests.letters import TEXT, make_letters

from narrowkv.errors import OutputError, TextError
from narrowkv.evaluate.results import ResultFile, read_result
from narrowkv.evaluate.tasks import BASELINE, TaskOptions, run_tasks
from narrowkv.methods import get_recipe
from narrowkv.report.tasks import sections

OPTIONS = TaskOptions(
    tasks=("passkey", "variables"), lengths=(400, 480), depths=(0, 1), rows=2, window=64, samples=2, new_tokens=3
)
RECIPES = ["nuq2", "int4"]


def opened(path, options=OPTIONS):
    return ResultFile(path, "tasks", "narrowkv tasks", options.settings())


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A model, its tokenizer, a file of questions, and the metrics."""
    folder = tmp_path_factory.mktemp("tasks")
    model, tokenizer = make_tiny(), make_letters()
    file = folder / "niah.jsonl"
    long = {"context": "a fox " * 200, "input": "Who?", "answers": ["fox"], "dataset": "qasper"}
    rows = [{"input": "The fox is", "outputs": ["a", "b"]}, long]
    file.write_text("\n".join(map(json.dumps, rows)))
    steps = []
    path = folder / "tasks.json"
    run_tasks(model, tokenizer, RECIPES, TEXT, TEXT, OPTIONS, opened(path), [file], lambda *step: steps.append(step))
    assert steps[-1] == (len(steps), len(steps))
    return model, tokenizer, file, path


def test_every_metric_appears_once(asked):
    *_, file, path = asked
    rows = read_result(path, "tasks")["rows"]
    cells = [("passkey", length, depth) for length in (400, 480) for depth in (0, 1)]
    cells += [("variables", length, None) for length in (400, 480)]
    found = [(row["task"], row["length"], row["depth"], row["recipe"]) for row in rows if row["task"] != str(file)]
    assert sorted(found, key=str) == sorted(((*cell, name) for cell in cells for name in (BASELINE, *RECIPES)), key=str)
    of_file = [row for row in rows if row["task"] == str(file)]
    assert [row["recipe"] for row in of_file] == [BASELINE, *RECIPES]
    assert of_file[0]["measure"] == "all found, f1" and of_file[0]["rows"] == 2
    assert of_file[0]["length"] == (10 + 512 - 3) // 2  # the long one without its middle
    assert all(0 <= row["score"] <= 1 for row in rows)


def test_an_interrupted_run_goes_on_and_more_can_be_asked_later(asked, tmp_path):
    model, tokenizer, file, path = asked
    saved = json.loads(path.read_text())
    kept = tmp_path / "tasks.json"
    kept.write_text(json.dumps({**saved, "rows": saved["rows"][:5]}))
    run_tasks(model, tokenizer, RECIPES, TEXT, TEXT, OPTIONS, opened(kept), [file])
    assert json.loads(kept.read_text())["rows"] == saved["rows"]
    # nothing is missing for nuq2, so no text is needed to calibrate it
    run_tasks(model, tokenizer, ["nuq2"], TEXT, None, OPTIONS, opened(kept), [file])
    assert json.loads(kept.read_text())["rows"] == saved["rows"]
    file_of_others = tmp_path / "other.jsonl"
    file_of_others.write_text(file.read_text())
    run_tasks(
        model,
        tokenizer,
        [],
        TEXT,
        None,
        TaskOptions(tasks=(), rows=2, new_tokens=1),
        results := opened(kept),
        [file_of_others],
    )
    assert results.rows[-1]["task"] == str(file_of_others)
    file_of_others.write_text(file.read_text() + "\n" + json.dumps({"input": "The", "outputs": ["a"]}))
    with pytest.raises(OutputError, match="other questions"):
        run_tasks(model, tokenizer, [], TEXT, None, OPTIONS, results, [file_of_others])
    impostor = get_recipe("int3").with_options(name="int4")
    with pytest.raises(OutputError, match="another recipe called int4"):
        run_tasks(model, tokenizer, [impostor], TEXT, None, OPTIONS, results)


@pytest.mark.parametrize(
    ("changes", "learn_from", "cause"),
    [
        ({"tasks": ("poem",)}, TEXT, "no task 'poem'"),
        ({"lengths": (513,)}, TEXT, "512 positions"),
        ({"lengths": (40,)}, TEXT, "lengths from"),
        ({}, None, "--calibration-text"),
        ({"new_tokens": 512}, TEXT, "line 1 has 10 tokens"),
    ],
)
def test_what_cannot_be_is_one_sentence(asked, tmp_path, changes, learn_from, cause):
    model, tokenizer, file, _ = asked
    options = TaskOptions(**{**OPTIONS.__dict__, **changes})
    with pytest.raises(TextError, match=cause):
        run_tasks(model, tokenizer, RECIPES, TEXT, learn_from, options, opened(tmp_path / "x.json", options), [file])
    assert not (tmp_path / "x.json").exists()


def test_sections_draw_from_the_file_alone(asked):
    saved = read_result(asked[-1])
    passkey, flat, files = sections(saved)
    assert [plot.name for plot in passkey.plots] == ["passkey"]
    assert [plot.name for plot in flat.plots] == ["lengths"]
    assert "does not do passkey (0%)" in passkey.text  # a random model
    (table,) = passkey.tables
    assert table.columns == ["task", "length", "depth", BASELINE, *RECIPES] and len(table.rows) == 4
    assert files.tables[0].rows[0][2] == 2
    assert [section.title for section in sections({**saved, "rows": saved["rows"][:1]})] == ["Passkey by depth and length"]
    assert sections({**saved, "rows": []}) == []
