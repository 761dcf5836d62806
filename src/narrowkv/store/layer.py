"""LayerStore: the keys and values of one layer for one batch: sealed blocks, an open tail, sinks and an exact window."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer, Encoded
from narrowkv.codec.ranges import require_finite
from narrowkv.errors import ActivationError, CacheUseError
from narrowkv.store import reading, steps
from narrowkv.store.bias import Bias, Numbers
from narrowkv.store.fitting import fitting
from narrowkv.store.page import BLOCK, Column, Page, move_together, to_blocks
from narrowkv.store.saturation import Saturation
from narrowkv.store.sinks import Places, find_sinks, take_sinks
from narrowkv.store.tail import Tail
from narrowkv.store.window import Window


class LayerStore:
    """Append-only packed storage of keys and values [batch, kv_heads, tokens, head_dim].

    sinks: the first real tokens of each sequence stay exact. window: the newest tokens stay exact (and a few more where
    several tokens are encoded together); the rest is encoded as soon as it leaves the window, one block at a time sealed.
    bias: what is taken out of numbers while they are encoded; its ledger knows new tokens before they come. A number is
    quantised once; `select` and `crop` move or drop codes and never touch them.
    """

    def __init__(self, keys: AnyQuantizer, values: AnyQuantizer, sinks: int = 0, window: int = 0, bias: Bias | None = None):
        self.quantizers = (keys, values)
        self.bias = bias or Bias()
        self.sinks = sinks
        self.window = window
        self.schemes = (keys.scheme, values.scheme)
        self.ahead = [scheme.tokens_ahead for scheme in self.schemes]
        # tokens leave the window by so many, being encoded together
        self.together = max(scheme.tokens_together for scheme in self.schemes)
        self.reset()

    def reset(self) -> None:
        """Forget everything; recipes and tables stay."""
        self.columns: list[Column] = []
        self.sealed = 0  # tokens in columns
        self.saturation = Saturation()
        self.first = 0  # tokens forgotten, all of them before those held
        self.missing = 0  # first tokens whose numbers never came; others stand for those among them that are held
        self.growing: Page | None = None  # the page with free slots for blocks that come singly
        self.tail: Tail | None = None
        self.recent = Window(self.window + self.together - 1)
        self.sink_numbers: tuple[Tensor, Tensor] | None = None  # [batch, kv_heads, sinks, head_dim] each
        self.sink_index: Tensor | None = None  # [batch, sinks] int64 token index, -1 where not yet seen
        self.sinks_found = self.sinks == 0  # whether all are known to have been seen
        self.shape: tuple[int, int, int] | None = None  # batch, kv_heads, head_dim
        self.dtypes: tuple[torch.dtype, torch.dtype] | None = None  # of the keys and the values that came, and of exact ones

    @property
    def length(self) -> int:
        """Tokens of the sequence so far, padding and forgotten ones included."""
        return self.first + self.packed + self.recent.tokens

    @property
    def oldest(self) -> int:
        """The first token that is held as it came."""
        return max(self.first, self.missing)

    @property
    def packed(self) -> int:
        """Tokens held that are encoded."""
        return self.sealed + (self.tail.tokens if self.tail else 0)

    def parts(self) -> dict[str, list[Tensor]]:
        """All tensors that are held, each once, by what they are for."""
        pages = {id(page): page for page in (*(column.page for column in self.columns), self.growing) if page}
        sides = [side for page in pages.values() for side in (page.keys, page.values)]
        return {
            "codes": [plane for side in sides for plane in side.planes],
            "scales": [part for side in sides for part in side.ranges.values()],
            "outliers": [part for side in sides for part in side.outliers()],
            "tail": self.tail.tensors() if self.tail else [],
            "window": self.recent.tensors(),
            "sinks": [*(self.sink_numbers or ()), *([] if self.sink_index is None else [self.sink_index])],
            "slots": [column.slots for column in self.columns],
            "bias": self.bias.tensors(),
        }

    def tensors(self) -> list[Tensor]:
        """All tensors that are held, each once."""
        return [tensor for held in self.parts().values() for tensor in held]

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> None:
        """Store new tokens.

        keys, values: [batch, kv_heads, new, head_dim]. valid: [batch, new] bool, False for padding; None if all count.
        Raises CacheUseError if batch, heads, head_dim or dtypes differ from what is held, ActivationError on NaN and infinity;
        of single tokens on a GPU that are encoded without waiting for it, up to a block later.
        """
        shape, dtypes = fitting(self, keys, values)
        if steps.make_room(self, keys, values):
            steps.write(self, keys, values, None if valid is None else ~valid)
            steps.advance(self, keys.shape[2])
            steps.seal(self)
            return
        for numbers in (keys, values):  # before anything is stored, so that a refusal leaves all as it was
            require_finite(numbers, "Keys or values")
        skip = None if valid is None else ~valid
        sinks = None
        if not self.sinks_found:
            skip = keys.new_zeros(shape[0], keys.shape[2], dtype=torch.bool) if skip is None else skip
            sinks = self._find_sinks(skip)
        before, self.shape, self.dtypes = self.length, shape, dtypes
        try:
            self._append(keys, values, skip)
        except ActivationError:
            self.reset() if before == 0 else None
            raise
        if sinks is not None:
            take_sinks(self, keys, values, before, *sinks)

    def _append(self, keys: Tensor, values: Tensor, skip: Tensor | None) -> None:
        """Encode what leaves the exact window, and keep the rest."""
        if not self.windowed:
            return self._encode(keys, values, skip, keys.shape[2])
        leaving = self.leaving(keys.shape[2])
        if leaving:
            self._encode(*self.recent.oldest(leaving + max(self.ahead), keys, values, skip), leaving)
        self.recent.shift(leaving, keys, values, skip)

    @property
    def windowed(self) -> bool:
        """Whether new tokens stay exact at first."""
        return self.window > 0 or self.together > 1

    def leaving(self, new: int) -> int:
        """How many tokens leave the exact window when so many come."""
        return max(self.recent.tokens + new - self.window, 0) // self.together * self.together

    def release(self, leaving: int) -> None:
        """Encode the oldest tokens of the exact window."""
        nothing = [part[:, :, :0] for part in self.recent.held()[:2]]
        self._encode(*self.recent.oldest(leaving + max(self.ahead), nothing[0], nothing[1], None), leaving)
        self.recent.shift(leaving, nothing[0], nothing[1], None)

    def sinks_seen(self) -> bool:
        """Whether no more sinks will come."""
        if not self.sinks_found and self.sink_index is not None:
            self.sinks_found = bool((self.sink_index[:, -1] >= 0).all())
        return self.sinks_found

    def _find_sinks(self, skip: Tensor) -> Places | None:
        """The sinks among new tokens, as `find_sinks`; None once all were seen."""
        return None if self.sinks_seen() else find_sinks(skip, self.sink_index, self.sinks)

    def _encode(self, keys: Tensor, values: Tensor, skip: Tensor | None, new: int) -> None:
        """Quantise the first `new` tokens; whole blocks are sealed, the rest is the tail. A refusal leaves none behind."""
        before = self.packed
        try:
            self._encode_pieces(keys, values, skip, new)
        except ActivationError:
            self._drop(self.packed - before)
            raise

    def _encode_pieces(self, keys: Tensor, values: Tensor, skip: Tensor | None, new: int) -> None:
        """First what fills the tail, then whole blocks tile by tile, then a new tail."""
        tile = reading.tile_tokens(self, keys)
        to_seal = ((self.tail.tokens if self.tail else 0) + new) // BLOCK
        page: Page | None = None
        start = 0
        try:
            while start < new:
                held, left = self.tail.tokens if self.tail else 0, new - start
                whole = 0 if held else min(tile, left // BLOCK * BLOCK)
                stop = start + (whole or min(BLOCK - held, left))
                cuts = [_cut(part, skip, start, stop + more) for part, more in zip((keys, values), self.ahead, strict=True)]
                of_keys = self.bias.of_keys(self.first + self.packed, cuts[0][0].shape[2])
                parts = self.bias.taken_out(cuts[0], cuts[1], of_keys, self.schemes)
                self.saturation.see(self.quantizers, parts)
                if whole:
                    first, second = self.quantizers
                    pair = (first.encode(*parts[0]), second.encode(*parts[1]))
                    page = self._seal(pair, page, to_seal)
                else:
                    self.tail = self.tail or Tail(self.quantizers, keys, values)
                    self.tail.append(parts[0], parts[1], stop - start)
                    if self.tail.is_full:
                        page = self.seal_tail(page, to_seal)
                start = stop
        finally:
            if page:
                page.commit()

    def _seal(self, pair: tuple[Encoded, Encoded], page: Page | None, columns: int, count: int = BLOCK) -> Page:
        """Pack whole blocks, of which the first `count` tokens count, into `page`; without one, into one for `columns`."""
        assert self.shape is not None
        keys, values = (to_blocks(part) for part in pair)
        page = page or self._page(columns, keys, values)
        slots = torch.tensor(page.put(keys, values), dtype=torch.int64, device="cpu").view(-1, self.shape[0])
        self.columns += [Column(page, column.clone(), count) for column in slots]
        self.sealed += count * len(slots)
        return page

    def seal_tail(self, page: Page | None = None, columns: int = 1) -> Page:
        """Pack the full tail, as `_seal`; one that a GPU's steps write to stays where it is."""
        assert self.tail is not None
        sealed = self._seal(self.tail.block(), page, columns)
        if self.tail.stays:
            self.tail.clear()
        else:
            self.tail = None
        return sealed

    def _page(self, columns: int, keys: Encoded, values: Encoded) -> Page:
        """A page for `columns` columns, of which these are the first: just large enough, or with room to grow for singles."""
        assert self.shape is not None
        batch = self.shape[0]
        if columns > 1:
            return Page.allocate(self.quantizers, columns * batch, keys, values, exactly=True)
        if not self.growing or not self.growing.fits(keys, values):
            self.growing = Page.to_grow(self.quantizers, len(self.columns), batch, keys, values)
        return self.growing

    def tiles(self, stop: int | None = None, *, unsealed: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Decode the tokens held before `stop` (all by default), or of those the `unsealed` alone, piece by piece.

        Yields (index of the first token, keys, values) with keys and values [batch, kv_heads, tokens, head_dim] float32,
        or in the model's dtype where they are exact; sinks are put in place.
        """
        return reading.tiles(self, self.length if stop is None else min(stop, self.length), unsealed)

    def read(self, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """The tokens held before `stop`, decoded at once: keys, values [batch, kv_heads, stop - first, head_dim]."""
        pieces = [(keys, values) for _, keys, values in self.tiles(stop)]
        if not pieces:
            raise CacheUseError("There is nothing to read: the cache holds no token yet.")
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Keep the sequences named by `rows` [n] int64, in that order, repeats allowed; sealed blocks are shared."""
        rows = rows.cpu()
        self.columns = [replace(column, slots=column.slots[rows]) for column in self.columns]
        if self.tail:
            self.tail.select(rows)
        self.recent.select(rows)
        if self.sink_numbers is not None and self.sink_index is not None:
            self.sink_numbers = (self.sink_numbers[0][rows], self.sink_numbers[1][rows])
            self.sink_index = self.sink_index[rows]
        if self.shape:
            self.shape = (len(rows), *self.shape[1:])

    def forget(self, before: int) -> None:
        """Let go of whole blocks of tokens older than the token `before`; whoever calls knows that none will be read."""
        gone = 0
        while gone < len(self.columns) and self.first + self.columns[gone].count <= before:
            self.first += self.columns[gone].count
            self.sealed -= self.columns[gone].count
            gone += 1
        if not gone:
            return
        self.columns = self.columns[gone:]
        if self.growing and all(column.page is not self.growing for column in self.columns):
            self.growing = None
        run = list(takewhile(lambda column: column.page is self.columns[0].page, self.columns))
        if run and 2 * len(run) * len(run[0].slots) <= run[0].page.slots:  # a page mostly forgotten is not kept for the rest
            self.columns[: len(run)] = move_together(self.quantizers, run)

    def require_croppable(self, length: int, oldest: int) -> None:
        """Raise CacheUseError where the first `length` tokens cannot be gone on from: the token `oldest` was forgotten."""
        if length > 0 and oldest < self.oldest:
            raise CacheUseError(
                f"A sliding-window layer has forgotten its first {self.oldest} tokens, so the cache cannot be cropped to "
                f"{length}; call cache.reset() and read the text again."
            )

    def crop(self, length: int) -> None:
        """Drop all tokens from `length` on; a block that is cut keeps its codes and counts fewer tokens.

        Raises CacheUseError where tokens before `length` were forgotten that whoever goes on from there would read.
        """
        self.require_croppable(length, length - 1)
        if length == 0 and self.oldest:
            return self.reset()
        drop = max(self.length - length, 0)
        exact = min(drop, self.recent.tokens)
        self.recent.crop(self.recent.tokens - exact)
        self._drop(drop - exact)
        if self.sink_index is not None:
            self.sink_index[self.sink_index >= length] = -1
            self.sinks_found = False

    def _drop(self, drop: int) -> None:
        """Drop so many of the newest encoded tokens."""
        if self.tail and drop:
            keep = max(self.tail.tokens - drop, 0)
            drop -= self.tail.tokens - keep
            self.tail.crop(keep)
            if keep % self.together:  # a group cannot be cut, but a block may count fewer tokens
                self._seal(self.tail.block(), None, 1, keep).commit()
            if keep % self.together or not keep:
                self.tail = None
        while drop and self.columns:
            last = self.columns.pop()
            taken = min(last.count, drop)
            self.sealed -= taken
            drop -= taken
            if taken < last.count:
                self.columns.append(replace(last, count=last.count - taken))


def _cut(x: Tensor, skip: Tensor | None, start: int, stop: int) -> Numbers:
    """The tokens from `start` to before `stop`."""
    return x[:, :, start:stop], None if skip is None else skip[:, start:stop]
