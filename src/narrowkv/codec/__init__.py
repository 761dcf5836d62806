"""Datatypes, ranges, outliers and bit packing: pure functions on tensors."""

from typing import Any

from narrowkv.codec.blocks import BlockQuantizer
from narrowkv.codec.encoded import Encoded
from narrowkv.codec.points import PointQuantizer
from narrowkv.codec.quantizer import Quantizer
from narrowkv.codec.scheme import Scheme

AnyQuantizer = Quantizer | PointQuantizer | BlockQuantizer


def quantizer_for(scheme: Scheme, **tables: Any) -> AnyQuantizer:
    """The quantizer that a scheme asks for, with its tables; raises RecipeError where these do not fit it."""
    if scheme.axis == "block":
        return BlockQuantizer(scheme)
    return (Quantizer if scheme.codebook == "layer" else PointQuantizer)(scheme, **tables)


__all__ = ["AnyQuantizer", "BlockQuantizer", "Encoded", "PointQuantizer", "Quantizer", "Scheme", "quantizer_for"]
