"""Round-to-nearest baselines, calibration-free: `intB` (asymmetric integer) and `nfB` (NormalFloat), per token.

Keys are quantised after the rotary embedding: with one range per token that is better than before it
(KVQuant, section 3.2).
"""

import re

from narrowkv.codec import Scheme
from narrowkv.methods.recipe import Recipe

NAMES = ("int8", "int4", "int3", "int2", "nf4", "nf3", "nf2")


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"(int|nf)(\d+)", name)
    if match is None:
        return None
    scheme = Scheme(bits=int(match[2]), datatype="int" if match[1] == "int" else "nf", axis="token")
    return Recipe(name, keys=scheme, values=scheme)
