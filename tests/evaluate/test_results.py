"""Files of results: interrupted runs go on, other settings and damage are refused."""

import json

import pytest

from narrowkv.errors import FileFormatError, OutputError
from narrowkv.evaluate.results import ResultFile, read_result, write_result


def opened(path, **settings):
    return ResultFile(path, "compare", "narrowkv compare MODEL", settings or {"window": 8}, seed=3)


def test_an_interrupted_run_goes_on(tmp_path):
    path = tmp_path / "figures.json"
    first = opened(path)
    assert first.rows == [] and not path.exists()
    first.add({"recipe": "int4", "bits": 4.25})
    again = opened(path)
    assert again.find(recipe="int4") == {"recipe": "int4", "bits": 4.25} and again.find(recipe="int3") is None
    again.add({"recipe": "int3", "bits": 3.25})
    saved = read_result(path, "compare")
    assert [row["recipe"] for row in saved["rows"]] == ["int4", "int3"]
    assert saved["command"] == "narrowkv compare MODEL" and saved["seed"] == 3 and saved["environment"]["torch"]


def test_other_settings_and_kinds_are_refused(tmp_path):
    path = tmp_path / "figures.json"
    opened(path).add({"recipe": "int4"})
    with pytest.raises(OutputError, match="other settings"):
        opened(path, window=9)
    with pytest.raises(FileFormatError, match="results of compare, not of plan"):
        read_result(path, "plan")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "narrowkv-result", "format_version": 2}', "no"])
def test_damaged_files_are_detected(tmp_path, content):
    path = tmp_path / "figures.json"
    path.write_text(content)
    with pytest.raises(FileFormatError):
        opened(path)
    assert path.read_text() == content


def test_a_row_that_json_cannot_hold_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "figures.json"
    saved = opened(path)
    saved.add({"recipe": "int4"})
    with pytest.raises(OutputError, match="NaN"):
        saved.add({"recipe": "int3", "bits": float("nan")})
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_metrics_of_one_run_replace_those_before(tmp_path):
    path = tmp_path / "times.json"
    for milliseconds in (2.0, 1.0):
        write_result(path, "attention", "python -m benchmarks.attention", {"repeats": 5}, [{"milliseconds": milliseconds}])
    saved = read_result(path, "attention")
    assert saved["rows"] == [{"milliseconds": 1.0}] and saved["settings"] == {"repeats": 5} and saved["environment"]["cores"]
