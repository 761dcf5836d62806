"""NarrowKV quantizes the key/value cache of a language model to 2, 3 or 4 bits per element instead of 16.

Start with `PackedCache(model, "int4")`, or with `calibrate(model, batches, "narrow3")` and `PackedCache(model, calibration)`,
and pass the cache to `model.generate(..., past_key_values=cache)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from narrowkv._version import __version__

if TYPE_CHECKING:
    from narrowkv.calibration import Calibration
    from narrowkv.codec import Outliers, Quantization, Scheme, Transform
    from narrowkv.errors import NarrowKVError
    from narrowkv.integrations import (
        CacheGroup,
        DecodingGraph,
        PackedCache,
        calibrate,
        calibrate_many,
        cuda_graph,
        disable,
        enable,
        load_model,
        make_default,
    )
    from narrowkv.integrations.explain import explain
    from narrowkv.methods import Recipe, get_recipe, recipe_names

__all__ = [
    "CacheGroup",
    "Calibration",
    "DecodingGraph",
    "NarrowKVError",
    "Outliers",
    "PackedCache",
    "Quantization",
    "Recipe",
    "Scheme",
    "Transform",
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

_ELSEWHERE = {
    "Calibration": "calibration",
    "NarrowKVError": "errors",
    "Outliers": "codec",
    "Quantization": "codec",
    "Recipe": "methods",
    "Scheme": "codec",
    "Transform": "codec",
    "get_recipe": "methods",
    "recipe_names": "methods",
}  # all others are in `integrations`
_PACKAGES = (
    *("attention", "calibration", "codec", "errors", "evaluate", "integrations", "methods", "plan", "report", "store"),
    "training",
)


def __getattr__(name: str) -> Any:
    """A public name or subpackage, imported on first use, since torch and transformers take seconds to import."""
    if name in _PACKAGES:
        return import_module(f"narrowkv.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'narrowkv' has no attribute {name!r}")
    value = getattr(import_module(f"narrowkv.{_ELSEWHERE.get(name, 'integrations')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
