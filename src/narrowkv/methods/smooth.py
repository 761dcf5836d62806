"""`smooth-intB`: SmoothQuant (Xiao et al., arXiv 2211.10438) for keys: outlier channels migrate to the query, then integers.

Keys are divided by a factor for each pair of channels d and d + head_dim / 2, max|K|^alpha over the calibration texts, and
integers are taken per token and head; values are plain integers per token and head. The query's side of the product gets the
factor: reading multiplies it back, so the model's weights stay as they are. The published factor is
max|X|^alpha / max|W|^(1 - alpha); queries are never quantized here, so what they have to bear is left out. alpha is 0.5, as
published. Keys are quantized after the rotary embedding, with which a factor shared by a pair commutes.
"""

import re

from narrowkv.codec import Quantization, Scheme, Transform
from narrowkv.methods.recipe import Recipe

NAMES = ("smooth-int8", "smooth-int4")


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"smooth-int(\d+)", name)
    if match is None:
        return None
    values = Scheme(Quantization(int(match[1]), "int", strategy="token_head"))
    return Recipe(
        name,
        keys=Scheme(Quantization(int(match[1]), "int", strategy="token_head"), Transform(smooth_alpha=0.5)),
        values=values,
    )
