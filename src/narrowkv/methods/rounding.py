"""Round-to-nearest baselines: `intB` (asymmetric integer, the zero point in floating point), `nfB` (QLoRA's NormalFloat),
`fp4` (e2m1, a scale for every 32 channels) and `fp8` (e4m3, a scale for each token in each head).

They need no calibration, and keys are quantized after the rotary embedding: with one range per token that is better than
before it (KVQuant, section 3.2). `intB` and `nfB` take the range of a token over all its heads, with `-head` in each head for
itself. With `-channel`, keys are quantized per channel before the rotary embedding, with ranges from calibration
(`-channel-postrope`: after it). `-gG` on `fp4` and `-head` makes groups of G channels.
"""

import re

from narrowkv.codec import Quantization, Scheme, Transform
from narrowkv.codec.scheme_parts import Datatype, Strategy
from narrowkv.methods.recipe import Recipe

DATATYPES: dict[str, Datatype] = {"int": "int", "nf": "nf", "fp": "fp"}
NAMES = (
    *("int8", "int4", "int3", "int2", "nf4", "nf3", "nf2", "fp8", "fp4"),
    *("int4-head", "int3-head", "int2-head", "int4-channel", "int3-channel", "nf4-channel", "nf3-channel"),
)


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"(int|nf|fp)(\d+)(-head|-channel)?(-postrope)?(?:-g(\d+))?", name)
    if match is None:
        return None
    datatype, bits, kind, rotated, group = DATATYPES[match[1]], int(match[2]), match[3], match[4], match[5]
    by_head = kind == "-head" or datatype == "fp"
    if (rotated and kind != "-channel") or (group and not by_head) or (datatype == "fp" and kind):
        return None
    size = int(group) if group else (32 if (datatype, bits) == ("fp", 4) else None)
    strategy: Strategy = "token_head" if by_head else "token"
    values = Scheme(Quantization(bits, datatype, strategy=strategy, group_size=size))
    keys = (
        Scheme(Quantization(bits, datatype, strategy="channel"), Transform(pre_rope=rotated is None))
        if kind == "-channel"
        else values
    )
    return Recipe(name, keys=keys, values=values)
