"""KVQuant (Hooper et al., arXiv 2401.18079): `nuqB`, `nuqB-P%`, and either with `-qnorm` or `-postrope`.

Keys per channel before the rotary embedding with static ranges, values per token with online ranges, a Fisher-weighted
codebook per layer for each, P percent of the numbers of each vector kept exact, and the first token exact. With `-postrope`
keys are quantised as they come out of the rotary embedding (the paper's ablation; all that the dense path can do).
"""

import re

from narrowkv.codec import Scheme
from narrowkv.methods.recipe import Recipe

NAMES = ("nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq2-1%-qnorm", "nuq4", "nuq3", "nuq2")


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"nuq(\d+)(?:-(-?\d+(?:\.\d+)?)%)?(-qnorm)?(-postrope)?", name)
    if match is None:
        return None
    bits, outliers, qnorm = int(match[1]), float(match[2] or 0) / 100, match[3] is not None
    keys = Scheme(bits, "nuq", axis="channel", pre_rope=match[4] is None, outliers=outliers, qnorm=qnorm)
    values = Scheme(bits, "nuq", axis="token", outliers=outliers, qnorm=qnorm)
    return Recipe(name, keys=keys, values=values, sinks=1)
