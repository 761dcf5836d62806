"""NarrowKV keeps a language model's key/value cache in 2, 3 or 4 bits instead of 16."""

__version__ = "0.1.0"

from narrowkv.calibration import Calibration
from narrowkv.codec import Scheme
from narrowkv.errors import NarrowKVError
from narrowkv.integrations import (
    DecodingGraph,
    PackedCache,
    calibrate,
    calibrate_many,
    cuda_graph,
    disable,
    enable,
    explain,
    load_model,
    make_default,
)
from narrowkv.methods import Recipe, get_recipe, recipe_names

__all__ = [
    "Calibration",
    "DecodingGraph",
    "NarrowKVError",
    "PackedCache",
    "Recipe",
    "Scheme",
    "__version__",
    "calibrate",
    "calibrate_many",
    "cuda_graph",
    "disable",
    "enable",
    "explain",
    "get_recipe",
    "load_model",
    "make_default",
    "recipe_names",
]
