"""The drift of a cache from the exact one, by position."""

import argparse

import pytest
import torch
from benchmarks.real_models import Subject

from benchmarks import drift
from narrowkv import get_recipe, load_model


@pytest.fixture(scope="module")
def subject():
    model, tokenizer = load_model("narrowkv://demo", "float32")
    text = " ".join(f"Line {i} of a text says so." for i in range(400))
    return Subject("demo", model, tokenizer, {"mix": (text, 1)}, {"encyclopedia": text, "code": text[::-1]})


def test_kl_divergence_of_logits_is_that_of_their_distributions():
    exact, other = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    p, q = exact.double().softmax(-1), other.double().softmax(-1)
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)
    torch.testing.assert_close(drift.divergence(exact, other), expected)


@pytest.mark.parametrize("mode", drift.MODES)
def test_an_exact_recipe_does_not_drift_and_a_coarse_one_does(subject, mode, monkeypatch):
    monkeypatch.setattr(drift, "PROMPT", 40)
    ids = drift.generated(subject, 12)
    found = drift.drift(subject.model, {name: get_recipe(name) for name in ("fp16", "int2")}, mode, ids)
    assert found["fp16"].shape == (2, 12) and found["fp16"].abs().max() < 1e-8
    assert found["int2"][:, 1:].min() > 1e-5


def test_a_file_goes_on_where_it_was_interrupted(subject, monkeypatch, tmp_path):
    monkeypatch.setattr(drift, "PROMPT", 40)
    monkeypatch.setattr(drift, "BIN", 4)
    monkeypatch.setattr(drift, "load", lambda *_, **__: subject)
    options = argparse.Namespace(out=tmp_path, recipes=["int4"], new_tokens=8, dtype="float32", calibrations=None)
    assert [row["mode"] for row in drift.run("models/demo", options).rows] == ["strict", "stream"]
    options.recipes = ["int4", "int2"]
    rows = drift.run("models/demo", options).rows
    assert [(row["recipe"], row["mode"]) for row in rows[2:]] == [("int2", "strict"), ("int2", "stream")]
    assert all(len(row[text]) == 2 for row in rows for text in ("encyclopedia", "code"))
