"""`hadamard-intB`: integers per token and head after a randomized Hadamard rotation, as vLLM and llama.cpp do.

The rotation (QuaRot, arXiv 2404.00456) spreads outlier channels over the whole head. Keys are rotated after the rotary
embedding.
"""

import re

from narrowkv.codec import Quantization, Scheme, Transform
from narrowkv.methods.recipe import Recipe

NAMES = ("hadamard-int4", "hadamard-int3", "hadamard-int2")


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"hadamard-int(\d+)", name)
    if match is None:
        return None
    scheme = Scheme(Quantization(int(match[1]), "int", strategy="token_head"), Transform(hadamard=True))
    return Recipe(name, keys=scheme, values=scheme)
