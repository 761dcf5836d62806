"""Recipes that choose: what comes of them keeps to its budget and is the best of what there was."""

import pytest
import torch

from narrowkv.calibration.layer_fits import FitKey, LayerFits
from narrowkv.calibration.search import learn
from narrowkv.errors import RecipeError
from narrowkv.methods import get_recipe

SHAPES = {0: (2, 16), 3: (2, 16)}


def fits(*names):
    recipes = [get_recipe(name) for name in names]
    layers = {layer: LayerFits(recipes, layer, shape) for layer, shape in SHAPES.items()}
    generator = torch.Generator().manual_seed(0)
    for layer, part in layers.items():
        keys, values = (torch.randn(2, 2, 600, 16, generator=generator) * (1 + 3 * layer) for _ in range(2))
        keys.requires_grad_(), values.requires_grad_()
        rotated = keys * 1.0
        part.observe_range(keys, rotated, values)
        part.observe_codebook(keys, rotated, values)
        ((rotated + keys) * 2 + values).square().sum().backward()
    return recipes, layers


def test_schemes_that_differ_in_bits_share_a_fit():
    _, layers = fits("nuq4", "nuq3", "nuq2-qnorm", "narrow3", "narrow2.5", "nuq3.0")
    needs = [need for need in layers[0].fits if need.keys]
    assert len([need for need in needs if need.sampled]) == len([n for n in needs if n.scheme.datatype == "trellis"]) == 1
    of_layer = [need for need in needs if need.scheme.datatype == "nuq" and not need.sampled]
    assert len(of_layer) == 3  # 0%, 0.5%, 1% of outliers


@pytest.mark.parametrize(("name", "budget"), [("narrow2.5", 2.5), ("narrow3.2", 3.2), ("nuq3.9", 3.9)])
def test_the_choice_keeps_its_budget_and_names_every_layer(name, budget):
    (recipe,), layers = fits(name)
    learned = learn(recipe, layers)
    assert learned.report["bits"] <= budget == learned.report["budget"]
    assert learned.report["bits"] >= budget - 0.3
    assert set(learned.recipe.layers) == set(SHAPES) and learned.recipe.search_space is None and learned.recipe.name == name
    for layer, pair in learned.layers.items():
        schemes = learned.recipe.schemes(layer)
        assert (pair[0].scheme, pair[1].scheme) == (schemes.keys, schemes.values)
    total = sum(side["predicted_loss"] for sides in learned.report["layers"].values() for side in sides.values())
    assert learned.report["predicted_loss"] == pytest.approx(total)


def test_each_side_keeps_a_budget_of_its_own():
    (recipe,), layers = fits("narrow-k4.5-v3.5")
    report = learn(recipe, layers).report
    assert report["budget"] == 4.0 and report["bits"] == pytest.approx(sum(s["bits"] for s in report["sides"].values()) / 2)
    for side, budget in (("keys", 4.5), ("values", 3.5)):
        assert report["sides"][side]["budget"] == budget and budget - 0.4 < report["sides"][side]["bits"] <= budget
        assert report["layers"]["3"][side]["bits"] > report["layers"]["0"][side]["bits"]


def test_where_errors_cost_more_there_are_more_bits():
    (recipe,), layers = fits("narrow3.0")
    report = learn(recipe, layers).report["layers"]
    assert report["3"]["keys"]["bits"] > report["0"]["keys"]["bits"]
    assert report["3"]["values"]["bits"] > report["0"]["values"]["bits"]


def test_a_budget_too_small_is_refused_by_name():
    (recipe,), layers = fits("narrow0.5")
    with pytest.raises(RecipeError, match=r"narrow0\.5: a budget of 0\.5 bits"):
        learn(recipe, layers)


def test_a_fit_key_has_the_settings_that_statistics_depend_on():
    keys = get_recipe("nuq2-1%").keys
    assert FitKey.of(keys, True, 1) != FitKey.of(get_recipe("nuq2").keys, True, 1)
    assert FitKey.of(keys, True, 1) == FitKey.of(get_recipe("nuq4-1%").keys, True, 1)
    assert FitKey.of(keys, True, 1) != FitKey.of(keys, True, 5)
