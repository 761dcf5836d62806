"""Where new tokens of several sequences go in pages: runs of tokens in one block, grouped as they are encoded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.codec.frames import MIDDLE
from narrowkv.codec.scheme_parts import BLOCK

BLOCKS = 2  # of a page
PAGE = BLOCKS * BLOCK  # tokens


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
    """Runs that are encoded in one call: of as many tokens from the same offset on, or of one token each at any offset."""

    runs: list[Run]
    pages: Tensor  # [runs] int64
    blocks: Tensor  # the same, of the page
    offsets: Tensor  # [runs, tokens] int64, in the block
    rows: Tensor  # the same, which new token each is
    positions: Tensor  # the same, in the sequence
    sinks: Tensor | None  # [runs, tokens] bool, which are the first of their sequence; None where none is

    @property
    def single(self) -> bool:
        return self.rows.shape[1] == 1

    @property
    def first(self) -> int:
        """Where the encoder takes tokens to be: a single one is rotated to the middle of its frame before."""
        return MIDDLE if self.single else self.runs[0].first


def run_groups(starts: list[int], lengths: list[int], tables: list[list[int]]) -> list[RunGroup]:
    """The new tokens of each sequence, by blocks.

    starts: [sequences + 1], where each sequence's new tokens begin. lengths: of each with them. tables: the pages of each.
    """
    groups: dict[tuple[int, int], list[Run]] = {}
    for start, stop, length, table in zip(starts[:-1], starts[1:], lengths, tables, strict=True):
        at, position = start, length - (stop - start)
        while at < stop:
            first = position % BLOCK
            tokens = min(BLOCK - first, stop - at)
            run = Run(table[position // PAGE], position % PAGE // BLOCK, first, tokens, at, position)
            groups.setdefault((first, tokens) if tokens > 1 else (0, 1), []).append(run)
            at, position = at + tokens, position + tokens
    return [_group(runs) for runs in groups.values()]


def _group(runs: list[Run]) -> RunGroup:
    steps = torch.arange(runs[0].tokens, dtype=torch.int64, device="cpu")
    columns = [(run.page, run.block, run.first, run.start, run.position) for run in runs]
    pages, blocks, first, start, position = torch.tensor(columns, dtype=torch.int64, device="cpu").T
    sinks = [run for run in runs if run.position == 0]
    positions = position[:, None] + steps
    return RunGroup(
        runs, pages, blocks, first[:, None] + steps, start[:, None] + steps, positions, positions == 0 if sinks else None
    )
