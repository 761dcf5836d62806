"""Encoded: quantised numbers before they are packed, the form in which a cache's open tail is held."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Encoded:
    """Numbers [batch, kv_heads, tokens, head_dim] in codes; every operation here moves codes, none re-quantises.

    codes: [batch, kv_heads, tokens, head_dim], uint8, or the exact numbers themselves in the model's dtype.
    ranges: what is held of online ranges, by name, as `Scheme.range_forms` has it: `scale` and, unless it is symmetric,
        `zero`: [batch, 1 or kv_heads, tokens or groups, 1, groups or head_dim].
    outlier_index: [n] int64, ascending positions in the flattened codes; outlier_values: [n] in 16 bits. Or None.
    """

    codes: Tensor
    ranges: dict[str, Tensor] = field(default_factory=dict)
    outlier_index: Tensor | None = None
    outlier_values: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    def tensors(self) -> list[Tensor]:
        """All tensors that are held."""
        parts = (self.codes, *self.ranges.values(), self.outlier_index, self.outlier_values)
        return [part for part in parts if part is not None]

    def _with(self, select, keep_outlier, move_outlier) -> "Encoded":
        """Apply `select` to the dense parts; keep outliers by (row, head, token, channel) and move them alike."""

        def copy(part: Tensor) -> Tensor:  # never a view, which would keep all of the old storage
            return select(part).clone(memory_format=torch.contiguous_format)

        codes = copy(self.codes)
        ranges = {name: copy(part) for name, part in self.ranges.items()}
        if self.outlier_index is None or self.outlier_values is None:
            return Encoded(codes, ranges)
        where = torch.unravel_index(self.outlier_index, self.codes.shape)
        keep = keep_outlier(*where)
        index = ravel(move_outlier(*(part[keep] for part in where)), codes.shape)
        return Encoded(codes, ranges, index, self.outlier_values[keep])

    def slice(self, start: int, stop: int) -> "Encoded":
        """The tokens from `start`, where a group of them begins, to before `stop`."""

        def cut(part: Tensor) -> Tensor:
            together = self.tokens // part.shape[2]
            return part[:, :, start // together : -(-stop // together)]

        return self._with(
            cut,
            lambda row, head, token, channel: (token >= start) & (token < stop),
            lambda row, head, token, channel: (row, head, token - start, channel),
        )

    def padded(self, tokens: int) -> "Encoded":
        """The same numbers, followed by tokens that mean nothing, `tokens` in all."""

        def pad(part: Tensor) -> Tensor:
            room = tokens * part.shape[2] // self.tokens
            return torch.nn.functional.pad(part, (0, 0, 0, room - part.shape[2]))

        whole, ranges = pad(self.codes), {name: pad(part) for name, part in self.ranges.items()}
        if self.outlier_index is None:
            return Encoded(whole, ranges)
        index = ravel(torch.unravel_index(self.outlier_index, self.codes.shape), whole.shape)
        return Encoded(whole, ranges, index, self.outlier_values)

    def rows(self, index: Tensor) -> "Encoded":
        """The batch rows named by `index` [rows] int64, in that order, repeats allowed."""
        picked = [
            self._with(
                lambda part, row=row: part[row : row + 1],
                lambda r, head, token, channel, row=row: r == row,
                lambda r, head, token, channel: (torch.zeros_like(r), head, token, channel),
            )
            for row in index.tolist()
        ]
        return Encoded.cat(picked, dim=0)

    @staticmethod
    def cat(parts: list["Encoded"], dim: int = 2) -> "Encoded":
        """Join along tokens (dim 2) or rows (dim 0)."""
        if len(parts) == 1:
            return parts[0]
        codes = torch.cat([part.codes for part in parts], dim=dim)
        ranges = {name: torch.cat([part.ranges[name] for part in parts], dim=dim) for name in parts[0].ranges}
        if parts[0].outlier_index is None:
            return Encoded(codes, ranges)
        indices, values, offset = [], [], 0
        for part in parts:
            assert part.outlier_index is not None and part.outlier_values is not None
            where = list(torch.unravel_index(part.outlier_index, part.codes.shape))
            where[dim] = where[dim] + offset
            offset += part.codes.shape[dim]
            indices.append(ravel(where, codes.shape))
            values.append(part.outlier_values)
        index, order = torch.cat(indices).sort()
        return Encoded(codes, ranges, index, torch.cat(values)[order])


def ravel(where, shape) -> Tensor:
    """Flat index of the coordinates `where`, one int64 tensor per dimension of `shape`."""
    flat = where[0]
    for part, size in zip(where[1:], shape[1:], strict=True):
        flat = flat * size + part
    return flat
