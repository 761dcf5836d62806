"""What `narrowkv recipes` says of a recipe, over all presets."""

from itertools import combinations

from tests.presets import PRESETS

from narrowkv import get_recipe
from narrowkv.cli.recipes import describe


def test_no_two_schemes_are_described_alike():
    schemes = {scheme for name in PRESETS for pair in get_recipe(name).every_scheme() for scheme in pair}
    assert len({scheme.describe() for scheme in schemes}) == len(schemes)


def test_no_two_recipes_that_differ_are_described_alike():
    recipes = [get_recipe(name) for name in (*PRESETS, "nuq3.5", "narrow2.5-equal")]
    for one, other in combinations(recipes, 2):
        assert (describe(one) == describe(other)) == (one == other.with_options(name=one.name)), (one.name, other.name)


def test_the_search_space_is_counted():
    assert describe(get_recipe("kivi-2")) == (
        "int2, per channel, groups of 32",
        "int2, per token and head, groups of 32",
        "newest 128",
    )
    keys, values, exact = describe(get_recipe("narrow-k4-v2-equal"))
    assert keys == "trellis4.05, per channel, pre-RoPE, outliers 0.005; under 4.05 bits"
    assert values == (
        "trellis2.05, per channel, token norm, learned rotation, outliers 0.0025 or 1 other; under 2.05 bits, equal layers"
    )
    assert exact == "first 1"
    assert "or 8 others" in describe(get_recipe("nuq3.5"))[0]
