"""Datatypes, ranges, outliers and bit packing: pure functions on tensors."""

from typing import Any

from narrowkv.codec.encoded import Encoded
from narrowkv.codec.points import PointQuantizer
from narrowkv.codec.quantizer import Quantizer
from narrowkv.codec.scheme import Scheme

AnyQuantizer = Quantizer | PointQuantizer


def quantizer_for(scheme: Scheme, **tables: Any) -> AnyQuantizer:
    """The quantizer that a scheme asks for, with its tables; raises RecipeError where these do not fit it."""
    return (Quantizer if scheme.codebook == "layer" else PointQuantizer)(scheme, **tables)


__all__ = ["AnyQuantizer", "Encoded", "PointQuantizer", "Quantizer", "Scheme", "quantizer_for"]
