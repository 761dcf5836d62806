"""Trellis-coded streams with rates by channel: `trellis4`, `trellis3`, `trellis2`, and `trellisB.F` for any budget.

Keys, before the rotary embedding and turned to the middle of their frame of 16 tokens (`codec.frames`), and values are
transformed so that errors in all their coefficients cost alike and are uncorrelated; under a budget for the whole cache each
unit of 8 coefficients has 0 to 6 bits (`calibration.rates`), and all bits of a token's head are one trellis-coded stream
(`codec.trellis_quantizer`). Values are rotated to the axes of their covariance where that rotation costs fewer bits than it
gains. The budget counts everything that is held at 32,768 tokens: `trellisB` may take B bits and 0.05 more, `trellisB.F`, with
a point, exactly what it says. Trellis-coded quantization:
Marcellin and Fischer 1990; with a sliding window of bits as state: QTIP (arXiv 2406.11235).
"""

import re

from narrowkv.codec import Scheme
from narrowkv.methods.recipe import Choices, Recipe

NAMES = ("trellis4", "trellis3", "trellis2")
BUDGETS = {"2": 2.05, "3": 3.05, "4": 4.05}


def of_budget(bits: float, name: str | None = None) -> Recipe:
    """The recipe that takes at most so many bits for each element."""
    outliers = 0.005 if bits >= 3.5 else 0.0025 if bits >= 2.5 else 0.0  # at 2 bits they take more than they give
    keys = Scheme(bits, "trellis", axis="channel", pre_rope=True, outliers=outliers)
    values = [Scheme(bits, "trellis", axis="channel", outliers=outliers, turn=turn, token_norm=True) for turn in (True, False)]
    choices = Choices(bits, (keys,), tuple(values))
    return Recipe(name or f"trellis{float(bits)}", keys=keys, values=values[0], sinks=1, choices=choices)


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"trellis(\d|\d\.\d+)", name)
    if match is None or ("." not in match[1] and match[1] not in BUDGETS):
        return None
    return of_budget(BUDGETS.get(match[1]) or float(match[1]), name)
