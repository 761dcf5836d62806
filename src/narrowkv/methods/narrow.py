"""This package's own recipes: `narrow4`, `narrow3`, `narrow2`, `narrowB.F` for any budget, `narrow-kB-vB` for two.

Keys, before the rotary embedding and rotated to the middle of their frame of 16 tokens (`codec.frames`), and values are
transformed so that errors in all their coefficients cost alike and are uncorrelated; under a budget for the whole cache each
unit of 8 coefficients has 0 to 6 bits (`calibration.rates`), and all bits of a token's head are one trellis-coded stream
(`codec.trellis`). Values are rotated to the axes of their covariance where that rotation costs fewer bits than it
gains. The budget counts everything that is stored at 32,768 tokens: `narrowB` may take B bits and 0.05 more, `narrowB.F`,
with a point, exactly what it says; either side of `narrow-kB-vB` has such a budget, and what else is stored is halved. With
`-equal` all layers of one shape have streams of as many bytes.
Trellis-coded quantization: Marcellin and Fischer 1990; with a sliding window of bits as state: QTIP (arXiv 2406.11235).
"""

import re
from dataclasses import replace

from narrowkv.codec import Outliers, Quantization, Scheme
from narrowkv.errors import RecipeError
from narrowkv.methods.recipe import Recipe, SearchSpace

NAMES = ("narrow4", "narrow3", "narrow2")
BUDGETS = {"2": 2.05, "3": 3.05, "4": 4.05}
WIDTH = r"\d|\d\.\d+"


def of_budget(
    bits: float,
    name: str | None = None,
    rotated: bool = False,
    value_bits: float | None = None,
    equal_layers: bool = False,
) -> Recipe:
    """The recipe that takes at most this many bits for each element.

    rotated: keys are those after the rotary embedding. value_bits: of the values apart; `bits` is then for the keys alone.
    equal_layers: keys and values together have as many bytes in all layers. Raises RecipeError where these are no budgets.
    """
    of_keys = _scheme(bits, 0.0)  # at 2 bits, outliers of keys take more than they give
    of_values = _scheme(bits if value_bits is None else value_bits, 0.0025)
    keys = (of_keys, of_keys.with_settings(learned_rotation=True)) if rotated else (of_keys.with_settings(pre_rope=True),)
    values = tuple(of_values.with_settings(learned_rotation=rotation, token_norm=True) for rotation in (True, False))
    search_space = SearchSpace(bits, keys, values, value_bits, equal_layers)
    widths = f"{float(bits)}" if value_bits is None else f"-k{float(bits)}-v{float(value_bits)}"
    return Recipe(
        name or f"narrow{widths}{'-equal' * equal_layers}", keys=keys[0], values=values[0], sinks=1, search_space=search_space
    )


def with_equal_layers(recipe: Recipe) -> Recipe:
    """A recipe of this method with as many bytes of a token in all layers; raises RecipeError for any other."""
    if recipe.search_space is None or not recipe.search_space.by_rate:
        raise RecipeError(
            f"Recipe {recipe.name} does not allocate rates, so its layers are not made equal; take a narrow one."
        )
    name = recipe.name if recipe.search_space.equal_layers else f"{recipe.name}-equal"
    return replace(recipe, name=name, search_space=replace(recipe.search_space, equal_layers=True))


def _scheme(bits: float, fewest_outliers: float) -> Scheme:
    outliers = 0.005 if bits >= 3.5 else 0.0025 if bits >= 2.5 else fewest_outliers
    return Scheme(Quantization(bits, "trellis", strategy="channel"), outliers=Outliers(outliers))


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(rf"narrow(?:({WIDTH})|-k({WIDTH})-v({WIDTH}))(-postrope)?(-equal)?", name)
    if match is None:
        return None
    bits, value_bits = match[1] or match[2], match[3]
    if not all("." in width or width in BUDGETS for width in (bits, value_bits) if width):
        return None
    rotated, equal = match[4] is not None, match[5] is not None
    return of_budget(_budget(bits), name, rotated, _budget(value_bits) if value_bits else None, equal)


def _budget(width: str) -> float:
    return BUDGETS.get(width) or float(width)
