"""`nvfp4`: e2m1 codes with an e4m3 scale for every 16 channels and one more scale above those, NVIDIA's 4-bit format.

Source: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149). There the upper scale is one float32 number for a
whole tensor, whose largest number must be known before anything is rounded. A cache grows, so here each token of a layer has
its own, over all KV heads. That needs no calibration and cannot overflow; to the format's 4.5 bits per element it adds 16 bits
for each token: bfloat16, with float32's range, is enough, since the scales below are taken as multiples of what is stored.
Keys are quantized after the rotary embedding.
"""

from narrowkv.codec import Quantization, Scheme
from narrowkv.methods.recipe import Recipe

NAMES = ("nvfp4",)


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    scheme = Scheme(Quantization(4, "fp", strategy="token_head", group_size=16, scale_dtype="float8"))
    return Recipe(name, keys=scheme, values=scheme) if name == "nvfp4" else None
