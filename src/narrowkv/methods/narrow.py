"""This package's own recipes: `narrow4`, `narrow3`, `narrow2`, `narrowB.F` for any budget (docs/accuracy.md: what they lose).

Keys, before the rotary embedding and turned to the middle of their frame of 16 tokens (`codec.frames`), and values are
transformed so that errors in all their coefficients cost alike and are uncorrelated; under a budget for the whole cache each
unit of 8 coefficients has 0 to 6 bits (`calibration.rates`), and all bits of a token's head are one trellis-coded stream
(`codec.trellis_quantizer`). Values are rotated to the axes of their covariance where that rotation costs fewer bits than it
gains. The budget counts everything that is held at 32,768 tokens: `narrowB` may take B bits and 0.05 more, `narrowB.F`, with a
point, exactly what it says. Trellis-coded quantization: Marcellin and Fischer 1990; with a sliding window of bits as state:
QTIP (arXiv 2406.11235).
"""

import re
from dataclasses import replace

from narrowkv.codec import Scheme
from narrowkv.methods.recipe import Choices, Recipe

NAMES = ("narrow4", "narrow3", "narrow2")
BUDGETS = {"2": 2.05, "3": 3.05, "4": 4.05}


def of_budget(bits: float, name: str | None = None, rotated: bool = False) -> Recipe:
    """The recipe that takes at most so many bits for each element; rotated: keys are those after the rotary embedding."""
    outliers = 0.005 if bits >= 3.5 else 0.0025 if bits >= 2.5 else 0.0  # at 2 bits they take more than they give
    one = Scheme(bits, "trellis", axis="channel", outliers=outliers)
    keys = (one, replace(one, turn=True)) if rotated else (replace(one, pre_rope=True),)
    values = tuple(replace(one, turn=turn, token_norm=True) for turn in (True, False))
    choices = Choices(bits, keys, values)
    return Recipe(name or f"narrow{float(bits)}", keys=keys[0], values=values[0], sinks=1, choices=choices)


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"narrow(\d|\d\.\d+)(-postrope)?", name)
    if match is None or ("." not in match[1] and match[1] not in BUDGETS):
        return None
    return of_budget(BUDGETS.get(match[1]) or float(match[1]), name, match[2] is not None)
