"""`intrinsic-2`, `intrinsic-2-nearest`, either with `-kmeans`: the 2-bit codec by intrinsic values (`codec.intrinsic`).

Four levels v_min, v1, v2, v_max for each KV head of a block of 64 tokens, held in 16 bits each; v1 and v2 are the centres of
the two most frequent bins of a histogram of 64, or with `-kmeans` of two clusters. As published, a number takes the level
below it, so that next to nothing takes v_max, the largest number there is; with `-nearest` it takes the nearest. The published
description refreshes the levels periodically, over a sliding window of blocks. Here they are those of the block itself, never
older than what they stand for, and the newest tokens, up to 63 that do not fill a block yet, are exact. Keys are quantised
after the rotary embedding.
"""

import re

from narrowkv.codec import Scheme
from narrowkv.codec.scheme import Datatype
from narrowkv.methods.recipe import Recipe

NAMES = ("intrinsic-2", "intrinsic-2-nearest", "intrinsic-2-kmeans", "intrinsic-2-nearest-kmeans")


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"intrinsic-2(-nearest)?(-kmeans)?", name)
    if match is None:
        return None
    datatype: Datatype = "iv-kmeans" if match[2] else "iv"
    scheme = Scheme(2, datatype, axis="block", group=64, floor=match[1] is None)
    return Recipe(name, keys=scheme, values=scheme)
