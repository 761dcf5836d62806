"""`intrinsic-2`, `intrinsic-2-nearest`, either with `-kmeans`, any with `-wN`: the 2-bit codec by intrinsic values.

Four levels v_min, v1, v2, v_max (`codec.intrinsic`) for each KV head of a block of 64 tokens, stored in 16 bits each; v1 and
v2 are the centers of the two most frequent bins of a histogram of 64, or with `-kmeans` of two clusters. As published, a
number takes the level below it, so that next to nothing takes v_max, the largest element there is; with `-nearest` it takes
the nearest. The levels are those of the block itself, or with `-wN` of a sliding window of N blocks that moves on with each:
itself and the N - 1 after it. Tokens whose window is not complete, the newest 64 N - 1 at most, are exact. Keys are quantized
after the rotary embedding.
"""

import re

from narrowkv.codec import Quantization, Scheme
from narrowkv.codec.scheme_parts import Datatype
from narrowkv.methods.recipe import Recipe

NAMES = ("intrinsic-2", "intrinsic-2-nearest", "intrinsic-2-kmeans", "intrinsic-2-nearest-kmeans", "intrinsic-2-nearest-w4")


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    match = re.fullmatch(r"intrinsic-2(-nearest)?(-kmeans)?(?:-w(\d+))?", name)
    if match is None:
        return None
    datatype: Datatype = "iv-kmeans" if match[2] else "iv"
    scheme = Scheme(
        Quantization(
            2, datatype, strategy="block", group_size=64, round_down=match[1] is None, lookahead_blocks=int(match[3] or 1)
        )
    )
    return Recipe(name, keys=scheme, values=scheme, residual_length=scheme.lookahead_tokens)
