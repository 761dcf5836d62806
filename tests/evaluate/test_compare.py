"""Comparing recipes: rows as `measure` gives them, and runs that were interrupted go on."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from tests.letters import TEXT, make_letters

from narrowkv import PackedCache, calibrate, get_recipe
from narrowkv.errors import OutputError, TextError
from narrowkv.evaluate import compare as comparing
from narrowkv.evaluate import cut_windows, measure
from narrowkv.evaluate.compare import DYNAMIC, CompareOptions, compare
from narrowkv.evaluate.results import ResultFile, read_result

LETTERS = make_letters()
LEARN_FROM = "A journey of a thousand miles begins with a single step, in the morning. " * 30
OPTIONS = CompareOptions(window=64, limit=2, samples=2, context=150, decode_steps=2, recall_distance=0)
TIMES = {"decode_ms", "decode_ms_least", "load"}


class Interruption(Exception):
    pass


def opened(path):
    return ResultFile(path, "compare", "narrowkv compare tiny", asdict(OPTIONS))


def run(model, recipes, path, on_step=None, learn_from=LEARN_FROM):
    compare(model, LETTERS, recipes, TEXT, learn_from, OPTIONS, opened(path), on_step)
    return read_result(path, "compare")["rows"]


def lasting(rows):
    return [{name: figure for name, figure in row.items() if name not in TIMES} for row in rows]


def test_rows_are_what_measuring_gives(tiny, tmp_path):
    model, seen = tiny(), []
    dynamic, row = run(model, ["nuq3-1%"], tmp_path / "compare.json", lambda done, total: seen.append((done, total)))
    windows = cut_windows(LETTERS, TEXT, 64, 2)
    calibration = calibrate(model, cut_windows(LETTERS, LEARN_FROM, 64, 2).split(1), "nuq3-1%")
    (expected,) = measure(model, [calibration], windows)
    for name in ("perplexity_strict", "perplexity_stream", "kld_strict", "kld_strict_p99", "top1", "tokens"):
        assert row[name] == getattr(expected, name)
    cache = PackedCache(model, calibration)
    model(torch.cat([windows[:1]] * 3, dim=1)[:, :150], past_key_values=cache)
    assert row["nbytes"] == pytest.approx(cache.nbytes, rel=0.02)  # other elements, other outliers
    assert dynamic["recipe"] == DYNAMIC and dynamic["nbytes"] == 2 * 2 * 2 * 150 * 16 * 4
    assert row["decode_ms"] >= row["decode_ms_least"] > 0 and row["threads"] == torch.get_num_threads()
    assert seen == [(i, 9) for i in range(1, 10)]


def test_rows_of_allocated_rates_include_the_rates(tiny, tmp_path):
    model = tiny(head_dim=64)
    _, row, plain = run(model, ["narrow5.5", "int4"], tmp_path / "compare.json")
    assert list(row["rates"]) == ["keys", "values"] and plain["rates"] is None
    for side in row["rates"].values():
        assert list(side) == ["0", "1"] and all(sum(counts) == 64 // 8 for counts in side.values())


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    model, recipes, path = tiny(), ["nuq3", "int4"], tmp_path / "compare.json"
    whole = run(model, recipes, tmp_path / "whole.json")

    def interrupt(done, total):
        if path.exists() and len(read_result(path)["rows"]) == 2:
            raise Interruption

    with pytest.raises(Interruption):
        run(model, recipes, path, interrupt)
    measured = []
    monkeypatch.setattr(
        comparing, "measure", lambda model, sources, *a, **k: measured.extend(sources) or measure(model, sources, *a, **k)
    )
    monkeypatch.setattr(comparing, "calibrate_many", None)  # what has its row is not calibrated again
    assert lasting(run(model, recipes, path)) == lasting(whole)
    assert [recipe.name for recipe in measured] == ["int4"]
    assert run(model, recipes, path) == read_result(path)["rows"] and len(measured) == 1


def test_impossible_comparisons_are_refused(tiny, tmp_path):
    model, path = tiny(), tmp_path / "compare.json"
    with pytest.raises(TextError, match="--calibration-text"):
        run(model, ["nuq3"], path, learn_from=None)
    assert not path.exists()
    run(model, ["int4"], path)
    mine = replace(get_recipe("int3"), name="int4")
    with pytest.raises(OutputError, match="another recipe called int4"):
        run(model, [mine], path)
    assert len(json.loads(path.read_text())["rows"]) == 2
