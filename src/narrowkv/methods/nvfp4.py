"""`nvfp4`: e2m1 codes with an e4m3 scale for every 16 channels and a float32 scale above those, NVIDIA's 4-bit format.

Source: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149). There the float32 scale belongs to
a whole tensor, whose largest number must be known before anything is rounded; a cache grows, so here each token of a layer has
its own, over all KV heads. That needs no calibration and cannot overflow; to the format's 4.5 bits a number it adds 32 bits
for each token. Keys are quantised after the rotary embedding.
"""

from narrowkv.codec import Scheme
from narrowkv.methods.recipe import Recipe

NAMES = ("nvfp4",)


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    scheme = Scheme(4, "fp", axis="token_head", group=16, scale_dtype="float8")
    return Recipe(name, keys=scheme, values=scheme) if name == "nvfp4" else None
