"""Sinks: the first real tokens of each sequence, which are stored exactly alongside the codes."""

import torch
from torch import Tensor

SinkSlots = tuple[Tensor, Tensor, Tensor]


class Sinks:
    """This many tokens of each sequence (`count`), as they come to be seen.

    elements: keys and values [batch, kv_heads, count, head_dim]. index: [batch, count] int64, which token of the sequence each
    is, -1 where not yet seen. Both None before the first tokens.
    """

    def __init__(self, count: int):
        self.count = count
        self.reset()

    def reset(self) -> None:
        """Remove all."""
        self.elements: tuple[Tensor, Tensor] | None = None
        self.index: Tensor | None = None
        self.found = self.count == 0  # whether all are known to have been seen

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [*(self.elements or ()), *([] if self.index is None else [self.index])]

    def seen(self) -> bool:
        """Whether no more will come."""
        if not self.found and self.index is not None:
            self.found = bool((self.index[:, -1] >= 0).all())
        return self.found

    def find(self, skip: Tensor) -> SinkSlots | None:
        """Row, token and slot of the sinks among new tokens, which are then skipped too; None once all were seen.

        skip: [batch, new] bool, padding; changed in place.
        """
        if self.seen():
            return None
        have = skip.new_zeros(len(skip), dtype=torch.int64) if self.index is None else (self.index >= 0).sum(1)
        rank = have[:, None] + (~skip).cumsum(1) - 1  # of each real token within its sequence
        row, token = ((rank < self.count) & ~skip & (have < self.count)[:, None]).nonzero(as_tuple=True)
        skip[row, token] = True
        return row, token, rank[row, token]

    def take(self, keys: Tensor, values: Tensor, before: int, found: SinkSlots) -> None:
        """Keep the sinks among new tokens [batch, kv_heads, new, head_dim], which follow `before` others."""
        batch, heads, _, dim = keys.shape
        if self.index is None:
            self.index = torch.full((batch, self.count), -1, dtype=torch.int64, device=keys.device)
            blank = (batch, heads, self.count, dim)
            self.elements = (keys.new_zeros(blank), values.new_zeros(blank))
        assert self.elements is not None
        row, token, slot = found
        self.index[row, slot] = token + before
        for stored, elements in zip(self.elements, (keys, values), strict=True):
            stored[row, :, slot] = elements[row, :, token]

    def put(self, start: int, pair: tuple[Tensor, Tensor]) -> None:
        """Put sinks in place among dequantized tokens; start, pair: like those of `put_sinks`."""
        if self.index is not None and self.elements is not None:
            put_sinks(start, pair, self.index, self.elements)

    def crop(self, length: int) -> None:
        """Remove those among the tokens from `length` on."""
        if self.index is not None:
            self.index[self.index >= length] = -1
            self.found = False

    def select(self, rows: Tensor) -> None:
        """Keep the sequences named by `rows` [n] int64, in that order, repeats allowed."""
        if self.elements is not None and self.index is not None:
            self.elements = (self.elements[0][rows], self.elements[1][rows])
            self.index = self.index[rows]


def put_sinks(start: int, pair: tuple[Tensor, Tensor], index: Tensor, exact: tuple[Tensor, Tensor]) -> None:
    """Put sinks in place among dequantized tokens, the first of which is the token `start`.

    pair: keys and values [batch, kv_heads, tokens, head_dim]. index: [batch, sinks]; exact: [batch, kv_heads, sinks, head_dim]
    """
    inside = (index >= start) & (index < start + pair[0].shape[2])
    row, slot = inside.nonzero(as_tuple=True)
    token = index[row, slot] - start
    for elements, sinks in zip(pair, exact, strict=True):
        elements[row, :, token] = sinks[row, :, slot].to(elements.dtype)
