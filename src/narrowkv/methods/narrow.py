"""`narrow2`, `narrow3`, `narrow4` and `narrowB.F`: this package's own recipes (docs/accuracy.md: what they lose).

Codebooks of pairs (`codebooks`), values turned, and 1.5 to 4 bits a number, chosen for the keys and the values of each layer
under a budget for the whole (`calibration.allocation`). The budget counts everything that is held at 32,768 tokens. `narrowB`
may take B bits and 0.05 more (0.1 at 4 bits), about what `nuqB` costs; `narrowB.F`, with a point, exactly what it says.
"""

import re

from narrowkv.codec.scheme import PAIR_WIDTHS
from narrowkv.methods.codebooks import schemes
from narrowkv.methods.recipe import Choices, Recipe

NAMES = ("narrow4", "narrow3", "narrow2")
BUDGETS = {"2": 2.05, "3": 3.05, "4": 4.1}


def of_budget(bits: float, name: str | None = None, rotated: bool = False) -> Recipe:
    """The recipe that takes at most so many bits for each number; rotated: keys are those after the rotary embedding."""
    pairs = [schemes("pair", width, rotated=rotated) for width in PAIR_WIDTHS]
    keys, values = zip(*pairs, strict=True)
    return Recipe(name or f"narrow{float(bits)}", keys=keys[1], values=values[1], sinks=1, choices=Choices(bits, keys, values))


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"narrow(\d|\d\.\d+)(-postrope)?", name)
    if match is None or ("." not in match[1] and match[1] not in BUDGETS):
        return None
    return of_budget(BUDGETS.get(match[1]) or float(match[1]), name, match[2] is not None)
