"""Round-to-nearest baselines: `intB` (asymmetric integer, the zero point in floating point) and `nfB` (NormalFloat).

Per token they need no calibration, and keys are quantised after the rotary embedding: with one range per token that is better
than before it (KVQuant, section 3.2). With `-channel`, keys are quantised per channel before it, with ranges
from calibration (`-channel-postrope`: after it).
"""

import re

from narrowkv.codec import Scheme
from narrowkv.codec.scheme import Datatype
from narrowkv.methods.recipe import Recipe

DATATYPES: dict[str, Datatype] = {"int": "int", "nf": "nf"}
NAMES = ("int8", "int4", "int3", "int2", "nf4", "nf3", "nf2", "int4-channel", "int3-channel", "nf4-channel", "nf3-channel")


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"(int|nf)(\d+)(-channel)?(-postrope)?", name)
    if match is None or (match[4] and not match[3]):
        return None
    bits, datatype = int(match[2]), DATATYPES[match[1]]
    values = Scheme(bits, datatype, axis="token")
    keys = Scheme(bits, datatype, axis="channel", pre_rope=match[4] is None) if match[3] else values
    return Recipe(name, keys=keys, values=values)
