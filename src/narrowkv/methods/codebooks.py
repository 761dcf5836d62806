"""`channelB` and `pairB`: a codebook for each channel, or for each pair of channels; with `-P%` of the codes kept exact.

Learned in real units with Fisher weights, so that nothing is stored for a token but its codes. Pairs are coupled quantisation
(CQ, arXiv 2405.03917): one code of 2B bits stands for the channels d and d + head_dim / 2, those that the rotary embedding
turns together. Values are turned first (`calibration.point_fit.rotation`), which costs nothing when reading: attention sums
turned values and turns the sum back. With `-postrope` keys are quantised after the rotary embedding, and turned too.
"""

import re

from narrowkv.codec import Scheme
from narrowkv.codec.scheme import Sharing
from narrowkv.methods.recipe import Recipe

NAMES = ("channel4", "channel3", "channel2", "pair3", "pair3-1%", "pair2", "pair2-1%")


def schemes(codebook: Sharing, bits: float, outliers: float = 0.0, rotated: bool = False) -> tuple[Scheme, Scheme]:
    """Schemes of keys and values; rotated: keys are those after the rotary embedding."""
    values = Scheme(bits, "nuq", axis="channel", outliers=outliers, codebook=codebook, turn=True)
    keys = Scheme(bits, "nuq", axis="channel", outliers=outliers, codebook=codebook, pre_rope=not rotated, turn=rotated)
    return keys, values


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"(channel|pair)(\d(?:\.5)?)(?:-(\d+(?:\.\d+)?)%)?(-postrope)?", name)
    if match is None:
        return None
    codebook: Sharing = "pair" if match[1] == "pair" else "channel"
    keys, values = schemes(codebook, float(match[2]), float(match[3] or 0) / 100, match[4] is not None)
    return Recipe(name, keys=keys, values=values, sinks=1)
