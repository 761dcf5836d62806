"""KIVI (Liu et al., arXiv 2402.02750): `kivi-B`, with `-gG` for groups of G and `-rR` for a residual of R tokens.

Asymmetric integers without calibration. Keys as they come out of the rotary embedding, per channel in groups of 32
consecutive tokens; values per token in groups of 32 channels; the newest 128 tokens exact. A scale and a zero point of 16 bits
for 32 elements make 2 bits 3 and 4 bits 5, plus the residual. The published code lets keys leave the residual 128 at a time
and values one at a time; here both leave by groups, so that between R and R + G - 1 of the newest tokens are exact.
"""

import re

from narrowkv.codec import Quantization, Scheme
from narrowkv.methods.recipe import Recipe

NAMES = ("kivi-4", "kivi-2")


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"kivi-(\d+)(?:-g(\d+))?(?:-r(\d+))?", name)
    if match is None:
        return None
    bits, group, residual = int(match[1]), int(match[2] or 32), int(match[3] or 128)
    keys = Scheme(Quantization(bits, "int", strategy="channel", group_size=group))
    values = Scheme(Quantization(bits, "int", strategy="token_head", group_size=group))
    return Recipe(name, keys=keys, values=values, residual_length=residual)
