"""Datatypes, ranges, outliers and bit packing: pure functions on tensors."""

from typing import Any

from torch import Tensor

from narrowkv.codec.quantized import QuantizedTensor
from narrowkv.codec.quantizers.base import require_forms
from narrowkv.codec.quantizers.intrinsic import IntrinsicValueQuantizer
from narrowkv.codec.quantizers.scalar import Quantizer
from narrowkv.codec.quantizers.trellis import TrellisQuantizer
from narrowkv.codec.scheme import Scheme
from narrowkv.codec.scheme_parts import Outliers, Quantization, Transform

AnyQuantizer = Quantizer | IntrinsicValueQuantizer | TrellisQuantizer


def kind_of(scheme: Scheme) -> type[AnyQuantizer]:
    """The class of quantizer of a scheme."""
    if scheme.strategy == "block":
        return IntrinsicValueQuantizer
    if scheme.datatype == "trellis":
        return TrellisQuantizer
    return Quantizer


def quantizer_for(scheme: Scheme, **tables: Any) -> AnyQuantizer:
    """The quantizer of a scheme with its tables; raises RecipeError if these do not fit the scheme."""
    return kind_of(scheme)(scheme, **tables)


def load_quantizer(scheme: Scheme, tables: dict[str, Tensor], kv_heads: int, head_dim: int) -> AnyQuantizer:
    """The same with tables from a file; raises RecipeError unless these are what it needs, and could have been learned."""
    scheme.require_head_dim(head_dim)
    kind = kind_of(scheme)
    require_forms(tables, kind.forms(scheme, kv_heads, head_dim))
    quantizer = kind(scheme, **tables)
    quantizer.require_sound()
    return quantizer


__all__ = [
    "AnyQuantizer",
    "IntrinsicValueQuantizer",
    "Outliers",
    "Quantization",
    "QuantizedTensor",
    "Quantizer",
    "Scheme",
    "Transform",
    "TrellisQuantizer",
    "load_quantizer",
    "quantizer_for",
]
