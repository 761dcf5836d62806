"""SealedBlocks: the tokens of a store that fill whole blocks, packed in pages, which are allocated, shared and let go here."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer, QuantizedTensor
from narrowkv.store.page import BLOCK, BlockTableEntry, Page, compact, from_blocks, to_blocks

# elements encoded or dequantized at a time, which bounds the memory of intermediate results; on a GPU, where each launch costs
# time
TILE_NUMBERS, GPU_TILE_NUMBERS = 2**19, 2**23
MOST_BLOCKS = 512  # encoded at a time: a GPU launches fewer than 65,536 programs along tokens


def _tile_elements(device: torch.device) -> int:
    """How many elements are encoded or dequantized at a time."""
    return GPU_TILE_NUMBERS if device.type == "cuda" else TILE_NUMBERS


def tile_tokens(keys: Tensor) -> int:
    """How many tokens [batch, kv_heads, tokens, head_dim], whole blocks of them, are encoded at a time."""
    return min(max(_tile_elements(keys.device) // keys[:, :, 0].numel() // BLOCK, 1), MOST_BLOCKS) * BLOCK


class SealedBlocks:
    """Blocks of every sequence, oldest first.

    columns: where they lie, to be read alone. tokens: how many of their tokens count. version: raised by whatever changes
    them, so that whoever has looked at them knows whether they are still those.
    """

    def __init__(self, quantizers: tuple[AnyQuantizer, AnyQuantizer]):
        self.quantizers = quantizers
        self.version = 0
        self.hold([])

    def hold(self, columns: list[BlockTableEntry]) -> None:
        """Store these instead."""
        self.columns = columns
        self.tokens = sum(column.count for column in columns)
        self.growing: Page | None = None  # the page with free slots for blocks that come singly
        self.version += 1

    def pages(self) -> list[Page]:
        """All stored pages, each once."""
        pages = {id(page): page for page in (*(column.page for column in self.columns), self.growing) if page}
        return list(pages.values())

    def seal(self, pair: tuple[QuantizedTensor, QuantizedTensor], page: Page | None, columns: int, count: int = BLOCK) -> Page:
        """Pack whole blocks, of which the first `count` tokens count, into `page`; without one, into one for `columns`.

        Their outliers wait for `Page.commit`.
        """
        batch = len(pair[0].codes)
        keys, values = (to_blocks(part) for part in pair)
        page = page or self._page(columns, batch, keys, values)
        slots = torch.tensor(page.put(keys, values), dtype=torch.int64, device="cpu").view(-1, batch)
        self.columns += [BlockTableEntry(page, column.clone(), count) for column in slots]
        self.tokens += count * len(slots)
        self.version += 1
        return page

    def _page(self, columns: int, batch: int, keys: QuantizedTensor, values: QuantizedTensor) -> Page:
        """A page for `columns` columns, of which these are the first: just large enough, or with space to grow for singles."""
        if columns > 1:
            return Page.allocate(self.quantizers, columns * batch, keys, values, exactly=True)
        if not self.growing or not self.growing.fits(keys, values):
            self.growing = Page.to_grow(self.quantizers, len(self.columns), batch, keys, values)
        return self.growing

    def evict(self, before: int) -> int:
        """Evict whole blocks of the tokens before the token `before` of those stored; returns the number of evicted tokens."""
        gone = tokens = 0
        while gone < len(self.columns) and tokens + self.columns[gone].count <= before:
            tokens += self.columns[gone].count
            gone += 1
        if not gone:
            return 0
        self.columns = self.columns[gone:]
        self.tokens -= tokens
        self.version += 1
        if self.growing and all(column.page is not self.growing for column in self.columns):
            self.growing = None
        run = list(takewhile(lambda column: column.page is self.columns[0].page, self.columns))
        if run and 2 * len(run) * len(run[0].slots) <= run[0].page.slots:  # a page mostly evicted is not stored for the rest
            self.columns[: len(run)] = compact(self.quantizers, run)
        return tokens

    def drop(self, tokens: int) -> None:
        """Drop this many of the newest tokens; a block that is cut keeps its codes and counts fewer."""
        while tokens and self.columns:
            last = self.columns.pop()
            taken = min(last.count, tokens)
            self.tokens -= taken
            tokens -= taken
            if taken < last.count:
                self.columns.append(replace(last, count=last.count - taken))
        self.version += 1

    def select(self, rows: Tensor) -> None:
        """Keep the sequences named by `rows` [n] int64 on the CPU, in that order, repeats allowed; blocks are shared."""
        self.columns = [replace(column, slots=column.slots[rows]) for column in self.columns]
        self.version += 1

    def dequantize(self, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the codes stand for, some blocks at a time, until the token `stop` of those stored was there.

        Yields keys and values [batch, kv_heads, tokens, head_dim].
        """
        start = i = 0
        while i < len(self.columns) and start < stop:
            run = self._run(i, stop - start)
            slots, page = torch.cat([column.slots for column in run]), run[0].page
            tokens = (len(run) - 1) * BLOCK + run[-1].count
            keys, values = (
                from_blocks(quantizer.dequantize(side.take(slots)), len(run[0].slots))[:, :, :tokens]
                for quantizer, side in zip(self.quantizers, (page.keys, page.values), strict=True)
            )
            yield keys, values
            start += tokens
            i += len(run)

    def _run(self, first: int, tokens: int) -> list[BlockTableEntry]:
        """Columns from the one of that number on that are dequantized at once: of one page, of about this many tokens at
        most.
        """
        run = [self.columns[first]]
        page = run[0].page
        heads, _, dim = page.keys.shape
        limit = max(_tile_elements(page.device) // (BLOCK * len(run[0].slots) * heads * dim), 1)
        for following in self.columns[first + 1 : first + limit]:
            if following.page is not page or run[-1].count < BLOCK or len(run) * BLOCK >= tokens:
                break
            run.append(following)
        return run
