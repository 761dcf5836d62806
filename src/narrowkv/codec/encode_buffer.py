"""EncodeBuffer: memory for the codes of some tokens, which are written in position as they come."""

from typing import Any

import torch
from torch import Tensor

from narrowkv.codec.outlier_counter import OutlierCounter
from narrowkv.codec.quantized import QuantizedTensor, ravel
from narrowkv.codec.scheme import Scheme

AHEAD = 2  # tokens that a GPU may encode before the host learns how many outliers they had


class EncodeBuffer:
    """Encoded tokens and space for more.

    codes: [batch, kv_heads, tokens, codes of a head]; ranges: as `QuantizedTensor` has them; zeros where nothing was written
    yet. outlier_index: [capacity] int64, positions in the flattened codes, in order of arrival; outlier_values: [capacity] in
    16 bits; the first `outliers` of them count. Or None. addresses: where these lie, once a compiled encoder has looked.
    counter: of a GPU, which only a `CountedBuffer` has.
    """

    outliers: int
    counter: OutlierCounter | None = None

    def __init__(self, scheme: Scheme, batch: int, kv_heads: int, tokens: int, head_dim: int, like: Tensor, ahead: int = 0):
        """like: elements to be encoded, whose device and dtype count. ahead: how many outliers fit beyond those expected."""
        dtype, device = like.dtype, like.device
        codes, self._outlier_positions = scheme.codes(head_dim), scheme.outlier_positions(head_dim)
        shape = (batch, kv_heads, tokens, codes)
        self.scheme = scheme
        self.codes = torch.zeros(shape, dtype=dtype if scheme.bits == 16 else torch.uint8, device=device)
        self.ranges = {
            name: torch.zeros(batch, *form, dtype=stored_dtype, device=device)
            for name, (form, stored_dtype) in scheme.range_forms(kv_heads, tokens, codes).items()
        }
        self.tokens, self.outliers = tokens, 0
        self.addresses: tuple[int, ...] | None = None
        self.outlier_index: Tensor | None = None
        self.outlier_values: Tensor | None = None
        if scheme.outliers.fraction:
            stored = dtype if dtype.itemsize == 2 else torch.float16
            self.outlier_index = torch.zeros(0, dtype=torch.int64, device=device)
            self.outlier_values = torch.zeros(0, dtype=stored, device=device)
            positions = batch * kv_heads * tokens * self._outlier_positions
            self.reserve(int(1.125 * scheme.outliers.fraction * positions) + 1 + ahead)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of, whose memory is elsewhere."""
        return vars(self) | {"addresses": None}

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return QuantizedTensor(self.codes, self.ranges, self.outlier_index, self.outlier_values).tensors()

    def encoded(self) -> QuantizedTensor:
        """All that was written, without a copy; outliers in order of arrival."""
        if self.outlier_index is None or self.outlier_values is None:
            return QuantizedTensor(self.codes, self.ranges)
        index, values = self.outlier_index[: self.outliers], self.outlier_values[: self.outliers]
        return QuantizedTensor(self.codes, self.ranges, index, values, self._outlier_positions)

    def reserve(self, outliers: int) -> None:
        """Make sure that this many more outliers fit."""
        assert self.outlier_index is not None and self.outlier_values is not None
        missing = self.outliers + outliers - len(self.outlier_index)
        if missing > 0:
            more = max(missing, len(self.outlier_index))
            self.outlier_index, self.outlier_values = (
                torch.cat([part, part.new_zeros(more, *part.shape[1:])]) for part in (self.outlier_index, self.outlier_values)
            )
            self.addresses = None

    def put(self, first: int, encoded: QuantizedTensor) -> int:
        """Write tokens from the token `first` on; returns the outliers then stored, which the caller lets it count."""
        stop = first + encoded.tokens
        self.codes[:, :, first:stop] = encoded.codes
        for name, part in self.ranges.items():
            heads_per_program = self.tokens // part.shape[2]
            part[:, :, first // heads_per_program : stop // heads_per_program] = encoded.ranges[name]
        if encoded.outlier_index is None or encoded.outlier_values is None:
            return 0
        self.reserve(len(encoded.outlier_index))
        assert self.outlier_index is not None and self.outlier_values is not None
        row, head, token, position = torch.unravel_index(encoded.outlier_index, encoded.outlier_shape)
        outliers = self.outliers + len(encoded.outlier_index)
        self.outlier_index[self.outliers : outliers] = ravel(
            (row, head, token + first, position), self.encoded().outlier_shape
        )
        self.outlier_values[self.outliers : outliers] = encoded.outlier_values
        return outliers

    def crop(self, tokens: int) -> None:
        """Remove outliers of the token `tokens` and later ones; their codes may be written over."""
        if self.outlier_index is None or self.outlier_values is None:
            return
        index = self.outlier_index[: self.outliers]
        keep = index // self._outlier_positions % self.tokens < tokens
        self.outliers = int(keep.sum())
        self.outlier_index[: self.outliers] = index[keep]
        self.outlier_values[: self.outliers] = self.outlier_values[: len(keep)][keep]

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows named by `rows` [n] int64, in that order, repeats allowed."""
        picked = self.encoded().rows(rows)
        self.codes, self.ranges = picked.codes, picked.ranges
        self.outlier_index, self.outlier_values = picked.outlier_index, picked.outlier_values
        self.addresses = None
        self.outliers = 0 if picked.outlier_index is None else len(picked.outlier_index)


class CountedBuffer(EncodeBuffer):
    """One whose outliers a GPU counts, where tokens are encoded one by one."""

    counter: OutlierCounter

    def __init__(self, scheme: Scheme, batch: int, kv_heads: int, tokens: int, head_dim: int, like: Tensor, most: int):
        """most: outliers of one token."""
        self.counter = OutlierCounter(like.device)
        super().__init__(scheme, batch, kv_heads, tokens, head_dim, like, AHEAD * most)

    @property
    def outliers(self) -> int:
        """How many outliers count; waits for a GPU that may have found some. Raises ActivationError as
        `OutlierCounter.learn`.
        """
        return self.counter.exact()

    @outliers.setter
    def outliers(self, outliers: int) -> None:
        self.counter.put(outliers)

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [*super().tensors(), self.counter.counts]

    def promise(self, most: int) -> None:
        """Make sure that as many outliers fit as kernels may now find; waits where that is not sure."""
        if self.outlier_index is not None and self.counter.most + most > len(self.outlier_index):
            self.reserve(most)
        self.counter.promise(max(most, 1))  # where there are none, what does not fit is counted yet
