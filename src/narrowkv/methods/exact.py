"""The exact recipe: the model's own dtype, nothing quantized. It tests the plumbing and is the baseline of tables."""

from narrowkv.codec import Quantization, Scheme
from narrowkv.methods.recipe import Recipe

NAMES = ("fp16",)


def recipe(name: str) -> Recipe | None:
    """The recipe called `name`, or None if it is not one of this method's."""
    exact = Scheme(Quantization(bits=16, datatype="exact"))
    return Recipe(name, keys=exact, values=exact) if name == "fp16" else None
