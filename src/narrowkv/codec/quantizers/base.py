"""Tables: what quantizers of all kinds have in common, a scheme and the tensors learned for it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from narrowkv.codec.cuda.encode import TokenEncoder
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.quantized import QuantizedTensor
from narrowkv.codec.saturation import Saturation
from narrowkv.codec.scheme import Scheme
from narrowkv.errors import RecipeError

TableForm = tuple[tuple[int, ...], torch.dtype]


Self = TypeVar("Self", bound="BaseQuantizer")  # typing has it from Python 3.11 on


class BaseQuantizer:
    """Base of dataclasses whose fields are a scheme and tables of tensors or None.

    Tables whose first dimension is kv_heads have two dimensions or more, and more than one row.
    """

    scheme: Scheme

    def __init__(self, scheme: Scheme, **tables: Any):
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The tables by name, those that exist."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return {name: value for name, value in named if isinstance(value, Tensor)}

    @classmethod
    def forms(cls, scheme: Scheme, kv_heads: int, head_dim: int) -> dict[str, TableForm]:
        """The tables that a scheme has, all of them, by name: shape and dtype."""
        return {}

    def require_sound(self) -> None:
        """Raise RecipeError if a table has elements that no calibration finds."""
        for name, table in self.tensors().items():
            require_table(bool(table.isfinite().all()), name, "NaN or infinity")
        self._require_order()

    def _require_order(self) -> None:
        """Raise RecipeError where elements are out of the order that encoders trust."""

    def encodes_in_torch(self, device: torch.device) -> bool:
        """Whether nothing faster than plain torch encodes elements on a device."""
        return True

    def encode(self, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None) -> QuantizedTensor:
        """Quantize elements, once and for all; see `Quantizer.encode`."""
        raise NotImplementedError

    def encode_into(
        self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None
    ) -> int:
        """The same, written to the buffer from the token `first` on.

        Returns how many outliers the buffer then stores, and lets the caller count them (`EncodeBuffer.outliers`), so that a
        step that fails leaves nothing behind.
        """
        return buffer.put(first, self.encode(x, skip, saturation))

    def token_encoder(self) -> TokenEncoder | None:
        """What encodes single tokens on a GPU without waiting for it; None where that is not done."""
        return None

    def to(self: Self, device: torch.device) -> Self:
        """The same quantizer with its tables on `device`."""
        return type(self)(self.scheme, **{name: table.to(device) for name, table in self.tensors().items()})

    def of_heads(self: Self, first: int, count: int) -> Self:
        """The same quantizer for some of the KV heads alone."""
        tables = {
            name: table[first : first + count] if table.dim() > 1 and table.shape[0] > 1 else table
            for name, table in self.tensors().items()
        }
        return type(self)(self.scheme, **tables)


def require_forms(tables: Mapping[str, Tensor], forms: Mapping[str, TableForm]) -> None:
    """Raise RecipeError where tables are not exactly those, of those shapes and dtypes."""
    for name in sorted({*tables, *forms}):
        if name not in tables:
            raise RecipeError(f"table {name} is missing")
        if name not in forms:
            raise RecipeError(f"table {name} does not belong to its scheme")
        (shape, dtype), table = forms[name], tables[name]
        if tuple(table.shape) != shape or table.dtype != dtype:
            raise RecipeError(f"table {name} is {table.dtype} {list(table.shape)}, not {dtype} {list(shape)}")


def require_table(holds: bool, name: str, what: str) -> None:
    """Raise RecipeError if a condition on a table does not hold; what: the invalid contents."""
    if not holds:
        raise RecipeError(f"table {name} has {what}")
