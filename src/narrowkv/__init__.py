"""NarrowKV keeps a language model's key/value cache in 2, 3 or 4 bits instead of 16."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from narrowkv._version import __version__

if TYPE_CHECKING:
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
        load_model,
        make_default,
    )
    from narrowkv.integrations.explain import explain
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

_ELSEWHERE = {
    "Calibration": "calibration",
    "NarrowKVError": "errors",
    "Recipe": "methods",
    "Scheme": "codec",
    "get_recipe": "methods",
    "recipe_names": "methods",
}  # all others are the package's hold on transformers, `integrations`
_PACKAGES = ("attention", "calibration", "codec", "errors", "evaluate", "integrations", "methods", "plan", "report", "store")


def __getattr__(name: str) -> Any:
    """A public name, or a package of ours, imported when it is first asked for: torch and transformers take seconds."""
    if name in _PACKAGES:
        return import_module(f"narrowkv.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'narrowkv' has no attribute {name!r}")
    value = getattr(import_module(f"narrowkv.{_ELSEWHERE.get(name, 'integrations')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
