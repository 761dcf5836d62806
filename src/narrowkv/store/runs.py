"""Where new tokens of several sequences go in pages: runs of tokens in one block, grouped as they are encoded."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from narrowkv.codec.scheme_parts import BLOCK

BLOCKS = 2  # of a page
PAGE = BLOCKS * BLOCK  # tokens


class RotaryEmbedding(Protocol):
    """A rotary embedding of fixed frequencies, as `attention.rope` has it."""

    @property
    def interleaved(self) -> bool: ...
    def unrotation(self, rope_state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...
    def unrotate(self, x: Tensor, rope_state: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Run:
    """New tokens of one sequence that lie in one block.

    page, block: of the page. first: the offset in the block. start: which of the new tokens is the first. position: its
    position in the sequence.
    """

    page: int
    block: int
    first: int
    tokens: int
    start: int
    position: int


@dataclass(frozen=True)
class RunGroup:
    """Runs of equal length, encoded in one call. table: [runs, 5] int64, page, block, first, start and position. place: where
    it lies, its rows, and the tokens of each.
    """

    runs: list[Run]
    table: Tensor
    place: tuple[int, int, int]

    @classmethod
    def of(cls, runs: list[Run]) -> "RunGroup":
        rows = [(run.page, run.block, run.first, run.start, run.position) for run in runs]
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return cls(runs, table, (table.data_ptr(), len(runs), runs[0].tokens))


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of a step. positions: [tokens] int64, in their sequences."""

    groups: list[RunGroup]
    positions: Tensor
    _unrotations: dict[tuple[int, torch.dtype], "Unrotation"] = field(default_factory=dict)

    @classmethod
    def of(cls, starts: list[int], lengths: list[int], tables: list[list[int]]) -> "NewTokens":
        """starts: [sequences + 1], where each sequence's new tokens begin. lengths: of each with them. tables: the pages of
        each.
        """
        groups: dict[int, list[Run]] = {}
        positions: list[int] = []
        for start, stop, length, table in zip(starts[:-1], starts[1:], lengths, tables, strict=True):
            at, position = start, length - (stop - start)
            positions += range(position, length)
            while at < stop:
                first = position % BLOCK
                tokens = min(BLOCK - first, stop - at)
                run = Run(table[position // PAGE], position % PAGE // BLOCK, first, tokens, at, position)
                groups.setdefault(tokens, []).append(run)
                at, position = at + tokens, position + tokens
        return cls([RunGroup.of(runs) for runs in groups.values()], torch.tensor(positions, dtype=torch.int64, device="cpu"))

    def unrotation(self, rope: RotaryEmbedding, dtype: torch.dtype) -> "Unrotation":
        """What undoes the rotary embedding of keys in a dtype; found once."""
        known = self._unrotations.get((id(rope), dtype))
        if known is None:
            turns = torch.stack(rope.unrotation(self.positions, dtype), dim=1)
            known = Unrotation(rope, turns, (turns.data_ptr(), turns.shape[2], rope.interleaved))
            self._unrotations[id(rope), dtype] = known
        return known


@dataclass(frozen=True)
class Unrotation:
    """turns: cosines and sines [tokens, 2, pairs] float64. place: where they lie, pairs, and whether these are neighbors."""

    rope: RotaryEmbedding
    turns: Tensor
    place: tuple[int, int, bool]
