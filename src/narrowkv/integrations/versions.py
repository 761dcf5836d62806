"""What differs between the versions of transformers that are served (5.19 to 5.24)."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import cache_utils
from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("cache", "past_key_values")  # of the cache, as an argument and in outputs: 5.24 renamed the second to the first
CACHE = next(name for name in NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})

_DUMMY: type | None = getattr(cache_utils, "DummyLayer", None)  # missing in 5.19 to 5.21


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among arguments by either name, or None."""
    return next((given[name] for name in NAMES if given.get(name) is not None), None)


def keeps_nothing(layer: Any) -> bool:
    """Whether a layer of transformers' cache is only a placeholder for a layer without a state of its own."""
    return _DUMMY is not None and isinstance(layer, _DUMMY)
