"""KVQuant (Hooper et al., arXiv 2401.18079): `nuqB`, `nuqB-P%`, and either with `-qnorm` or `-postrope`.

Keys per channel before the rotary embedding with static ranges, values per token with online ranges, a Fisher-weighted
codebook per layer for each, P percent of the elements of each vector left exact, and the first token exact. With `-postrope`
keys are quantized as they come out of the rotary embedding (the paper's ablation; all that the dense path can do).
`nuqB.F`, with a point, is mixed precision: bits, outliers, and ranges by token or by token and head are chosen for the keys
and the values of each layer under a budget of B.F bits for the whole, everything counted at 32,768 tokens.
"""

import itertools
import re

from narrowkv.codec import Outliers, Quantization, Scheme, Transform
from narrowkv.codec.scheme_parts import Strategy
from narrowkv.methods.recipe import Recipe, SearchSpace

NAMES = ("nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq2-1%-qnorm", "nuq4", "nuq3", "nuq2")


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    mixed = re.fullmatch(r"nuq(\d\.\d+)", name)
    if mixed:
        return _mixed(name, float(mixed[1]))
    match = re.fullmatch(r"nuq(\d+)(?:-(-?\d+(?:\.\d+)?)%)?(-qnorm)?(-postrope)?", name)
    if match is None:
        return None
    bits, outliers, qnorm = int(match[1]), float(match[2] or 0) / 100, match[3] is not None
    keys = Scheme(
        Quantization(bits, "nuq", strategy="channel", qnorm=qnorm), Transform(pre_rope=match[4] is None), Outliers(outliers)
    )
    values = Scheme(Quantization(bits, "nuq", strategy="token", qnorm=qnorm), outliers=Outliers(outliers))
    return Recipe(name, keys=keys, values=values, sinks=1)


def _mixed(name: str, budget: float) -> Recipe:
    """The recipe that chooses among KVQuant's schemes."""
    strategies: tuple[Strategy, ...] = ("token", "token_head")
    widths, fractions = (2, 3, 4), (0.0, 0.005, 0.01)
    keys = [
        Scheme(Quantization(bits, "nuq", strategy="channel"), Transform(pre_rope=True), Outliers(part))
        for bits, part in itertools.product(widths, fractions)
    ]
    values = [
        Scheme(Quantization(bits, "nuq", strategy=strategy), outliers=Outliers(part))
        for bits, part, strategy in itertools.product(widths, fractions, strategies)
    ]
    return Recipe(name, keys=keys[0], values=values[0], sinks=1, search_space=SearchSpace(budget, tuple(keys), tuple(values)))
