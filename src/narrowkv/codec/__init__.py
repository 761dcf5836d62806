"""Datatypes, ranges, outliers and bit packing: pure functions on tensors."""

from narrowkv.codec.encoded import Encoded
from narrowkv.codec.quantizer import Quantizer
from narrowkv.codec.scheme import Scheme

__all__ = ["Encoded", "Quantizer", "Scheme"]
