"""The formats that scales are written in, and what each of them can say."""

from dataclasses import dataclass

from narrowkv.errors import RecipeError
from narrowkv.exports.static_scales import StaticQuantization


@dataclass(frozen=True)
class Format:
    """A format: datatypes and strategies that it has, the usual ones first, and whether it is a whole checkpoint."""

    datatypes: tuple[str, ...]
    strategies: tuple[str, ...]
    checkpoint: bool


FORMATS = {
    "compressed-tensors": Format(("fp8", "int8", "int4"), ("tensor", "head"), checkpoint=True),
    "onnxruntime-genai": Format(("int8", "int4", "fp8"), ("channel", "tensor"), checkpoint=False),
    "vllm-scales": Format(("fp8",), ("tensor", "head"), checkpoint=True),
}


def quantization_for(name: str, datatype: str | None, strategy: str | None) -> StaticQuantization:
    """What a format, by its name, is to store; by default what is usual there. Raises RecipeError for what it cannot say."""
    if name not in FORMATS:
        raise RecipeError(f"There is no format {name!r} of scales; choose one of {', '.join(FORMATS)}.")
    known = FORMATS[name]
    for given, choices in ((datatype, known.datatypes), (strategy, known.strategies)):
        if given is not None and given not in choices:
            raise RecipeError(f"Scales of {name} cannot be {given!r}, which is not read; choose {' or '.join(choices)}.")
    return StaticQuantization(datatype or known.datatypes[0], strategy or known.strategies[0])
