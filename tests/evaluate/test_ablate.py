"""The ablations: what each step is, and that rows are what measuring it alone gives."""

import itertools
from dataclasses import asdict

import pytest
from tests.families import make
from tests.letters import TEXT, make_letters

from narrowkv import calibrate, get_recipe
from narrowkv.errors import RecipeError
from narrowkv.evaluate import ablate as ablating
from narrowkv.evaluate import cut_windows, measure
from narrowkv.evaluate.ablate import AblateOptions, ablate
from narrowkv.evaluate.ablations import ABLATIONS, fits, rotates
from narrowkv.evaluate.results import ResultFile, read_result
from narrowkv.integrations import prepare

LETTERS = make_letters()
LEARN_FROM = " ".join(f"A journey of {i} miles begins with a single step, in the morning." for i in range(30))
OPTIONS = AblateOptions(bits=(3,), window=64, limit=1, samples=3, context=128)


def run(model, ablations, path, options=OPTIONS, on_step=None):
    results = ResultFile(path, "ablate", "narrowkv ablate tiny", asdict(options) | {"bits": list(options.bits)})
    ablate(model, LETTERS, ablations, TEXT, LEARN_FROM, options, results, on_step, {"mine": LEARN_FROM[::-1]})
    return read_result(path)["rows"]


def same_schemes(recipe, name, **changes):
    known = get_recipe(name).with_options(**changes)
    return (recipe.keys, recipe.values, recipe.sinks) == (known.keys, known.values, known.sinks)


def test_the_ablation_leads_from_integers_to_the_whole_method(tiny):
    ablation_steps = [ablation_step.recipe for ablation_step in ABLATIONS["steps"]([3], prepare(tiny()))]
    names = {0: "int3", 1: "int3-channel-postrope", 2: "int3-channel", 8: "nuq3-1%", 9: "nuq3-1%-qnorm"}
    assert all(same_schemes(ablation_steps[i], name) for i, name in names.items())
    assert same_schemes(ablation_steps[5], "nuq3", sinks=0) and same_schemes(ablation_steps[7], "nuq3-1%", sinks=0)
    assert [ablation_step.keys.quantization.weighting for ablation_step in ablation_steps[3:6]] == [
        "none",
        "fisher",
        "fisher_scaled",
    ]
    assert ablation_steps[6].keys.outliers.scope == ablation_steps[6].values.outliers.scope == "matrix"
    for before, after in itertools.pairwise(ablation_steps):  # a step at a time
        pairs = ((before.keys.to_dict(), after.keys.to_dict()), (before.values.to_dict(), after.values.to_dict()))
        changed = {name for old, new in pairs for name in old if old[name] != new[name]}
        changed |= {"sinks"} if before.sinks != after.sinks else set()
        assert len(changed) == 1 or changed in ({"datatype", "weighting"}, {"outliers", "outlier_scope"})


def test_a_model_without_rotary_embedding_has_no_ablation_steps_for_it():
    info = prepare(make("gpt2"))
    assert not rotates(info) and fits(8, info) and not fits(16, info) and not fits(12, info)
    ablation_steps = [ablation_step for ablation in ABLATIONS.values() for ablation_step in ablation([3], info)]
    assert not any(ablation_step.recipe.keys.transform.pre_rope for ablation_step in ablation_steps)
    assert "keys before RoPE" not in [ablation_step.label for ablation_step in ablation_steps]


def test_every_step_has_the_metrics_of_its_recipe_alone(tiny, tmp_path):
    model, seen = tiny(), []
    rows = run(model, list(ablating.NAMES), tmp_path / "ablate.json", on_step=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert list(dict.fromkeys(row["ablation"] for row in rows)) == [*ABLATIONS, "texts", "times"]
    learned = cut_windows(LETTERS, LEARN_FROM, 64, 3)
    windows = cut_windows(LETTERS, TEXT, 64, 1)
    calibration = calibrate(model, learned.split(1), "nuq3-1%")
    (expected,) = measure(model, [calibration], windows)
    alike = [row for row in rows if row.get("kld_strict") == expected.kld_strict]
    places = {(row["ablation"], row["label"]) for row in alike}
    assert places >= {
        ("steps", "first token exact"),
        ("outliers", "1.00%"),
        ("sinks", "1 exact"),
        ("parts", "both quantized"),
        ("texts", "3 of calibration text"),
    }
    few = next(row for row in rows if row["ablation"] == "texts" and row["sequences"] == 1)
    (of_one,) = measure(model, [calibrate(model, learned[:1], "nuq3-1%")], windows)
    assert few["kld_strict"] == of_one.kld_strict != expected.kld_strict
    assert {row["text"] for row in rows if row["ablation"] == "texts"} == {
        "calibration text",
        "mine",
        ablating.SAME_TEXT,
        ablating.RANDOM,
    }
    (layers,) = (row["layers"] for row in rows if row.get("side") == "layers")
    assert len(layers) == 4 and all(cell["kld_strict"] > 0 for cell in layers)
    times = [row for row in rows if row["ablation"] == "times"]
    assert [row["label"] for row in times] == list(ablating.TIMED) and all(row["seconds_fit"] > 0 for row in times)


def test_an_interrupted_ablation_goes_on(tiny, tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "ablate.json"
    whole = run(model, ["sinks"], tmp_path / "whole.json")

    def interrupt(done, total):
        if path.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, ["sinks"], path, on_step=interrupt)
    assert len(read_result(path)["rows"]) == 1
    measured = []
    monkeypatch.setattr(
        ablating, "measure", lambda model, sources, *a, **k: measured.extend(sources) or measure(model, sources, *a, **k)
    )
    assert run(model, ["sinks"], path) == whole and len(measured) == len(whole) - 1


@pytest.mark.parametrize(("ablations", "bits", "cause"), [(["bits"], (3,), "no ablation 'bits'"), (["steps"], (5,), "not 5")])
def test_impossible_ablations_are_refused(tiny, tmp_path, ablations, bits, cause):
    with pytest.raises(RecipeError, match=cause):
        run(tiny(), ablations, tmp_path / "ablate.json", AblateOptions(bits=bits, window=64))
    assert not list(tmp_path.iterdir())
