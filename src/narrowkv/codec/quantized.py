"""Encoded: quantized elements before they are packed."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class QuantizedTensor:
    """Elements [batch, kv_heads, tokens, head_dim] in codes; every operation here moves codes, none re-quantizes.

    codes: [batch, kv_heads, tokens, head_dim], uint8, or the exact elements themselves in the model's dtype.
    ranges: stored online ranges, by name, as `Scheme.range_forms` has it: `scale` and, unless it is symmetric,
        `zero`: [batch, 1 or kv_heads, tokens or groups, 1, groups or head_dim].
    outlier_index: [n] int64, ascending positions in the flattened codes; outlier_values: [n] in 16 bits. Or None.
    outlier_positions: of a token in one head, where these are not the codes (`Scheme.outlier_positions`); None where they are.
    """

    codes: Tensor
    ranges: dict[str, Tensor] = field(default_factory=dict)
    outlier_index: Tensor | None = None
    outlier_values: Tensor | None = None
    outlier_positions: int | None = None

    @property
    def outlier_shape(self) -> tuple[int, int, int, int]:
        """The shape that `outlier_index` counts in: batch, kv_heads, tokens, coefficients of a token in one head."""
        batch, heads, tokens, codes = self.codes.shape
        return batch, heads, tokens, codes if self.outlier_positions is None else self.outlier_positions

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    def outlier_mask(self) -> Tensor:
        """Which elements, or coefficients, outliers replace: bool of `outlier_shape`."""
        mask = torch.zeros(self.outlier_shape, dtype=torch.bool, device=self.codes.device)
        if self.outlier_index is not None:
            mask.view(-1)[self.outlier_index] = True
        return mask

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        parts = (self.codes, *self.ranges.values(), self.outlier_index, self.outlier_values)
        return [part for part in parts if part is not None]

    def first(self, tokens: int) -> "QuantizedTensor":
        """A copy of the first tokens, whole groups of them, with outliers in ascending order, whatever theirs is here."""

        def cut(part: Tensor) -> Tensor:  # never a view, which would keep all of the old storage
            return part[:, :, : tokens * part.shape[2] // self.tokens].clone(memory_format=torch.contiguous_format)

        codes, ranges = cut(self.codes), {name: cut(part) for name, part in self.ranges.items()}
        if self.outlier_index is None or self.outlier_values is None:
            return QuantizedTensor(codes, ranges)
        where, (batch, heads, _, positions) = torch.unravel_index(self.outlier_index, self.outlier_shape), self.outlier_shape
        keep = where[2] < tokens
        index, order = ravel([part[keep] for part in where], (batch, heads, tokens, positions)).sort()
        return QuantizedTensor(codes, ranges, index, self.outlier_values[keep][order], self.outlier_positions)

    def rows(self, rows: Tensor) -> "QuantizedTensor":
        """The batch rows named by `rows` [n] int64, in that order, repeats allowed; outliers of a row keep their order."""
        rows = rows.to(self.codes.device)
        codes, ranges = self.codes[rows], {name: part[rows] for name, part in self.ranges.items()}
        if self.outlier_index is None or self.outlier_values is None:
            return QuantizedTensor(codes, ranges)
        size = math.prod(self.outlier_shape[1:])
        at = self.outlier_index // size
        row, which = (at == rows[:, None]).nonzero(as_tuple=True)
        index = self.outlier_index[which] + (row - at[which]) * size
        return QuantizedTensor(codes, ranges, index, self.outlier_values[which], self.outlier_positions)


def ravel(where, shape) -> Tensor:
    """Flat index of the coordinates `where`, one int64 tensor per dimension of `shape`."""
    flat = where[0]
    for part, size in zip(where[1:], shape[1:], strict=True):
        flat = flat * size + part
    return flat
