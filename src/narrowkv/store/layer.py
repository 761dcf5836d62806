"""LayerStore: the keys and values of one layer for one batch: sealed blocks, an open tail, sinks and an exact window."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer, Encoded
from narrowkv.codec.ranges import require_finite
from narrowkv.errors import CacheUseError
from narrowkv.store.page import BLOCK, Column, PackedSide, Page, from_blocks, move_together, to_blocks

TILE_NUMBERS = 2**19  # numbers encoded or decoded at a time, which bounds the memory of intermediate results
GROWTH = 16  # while decoding, a new page holds one more sixteenth of what is stored


class LayerStore:
    """Append-only packed storage of keys and values [batch, kv_heads, tokens, head_dim].

    sinks: the first real tokens of each sequence stay exact. window: the newest tokens stay exact (and a few more where
    several tokens are encoded together); the rest is encoded as soon as it leaves the window, one block at a time sealed.
    A number is quantised once; `select` and `crop` move or drop codes and never touch them.
    """

    def __init__(self, keys: AnyQuantizer, values: AnyQuantizer, sinks: int = 0, window: int = 0):
        self.quantizers = (keys, values)
        self.sinks = sinks
        self.window = window
        self.ahead = [quantizer.scheme.tokens_ahead for quantizer in self.quantizers]
        # tokens leave the window by so many, being encoded together
        self.together = max(quantizer.scheme.tokens_together for quantizer in self.quantizers)
        self.reset()

    def reset(self) -> None:
        """Forget everything; recipes and tables stay."""
        self.columns: list[Column] = []
        self.sealed = 0  # tokens in columns
        self.first = 0  # tokens forgotten, all of them before those held
        self.growing: Page | None = None  # the page with free slots for blocks that come singly
        self.tail: tuple[Encoded, Encoded] | None = None
        self.recent: tuple[Tensor, Tensor] | None = None  # [batch, kv_heads, up to window, head_dim] each
        self.recent_skip: Tensor | None = None
        self.sink_numbers: tuple[Tensor, Tensor] | None = None  # [batch, kv_heads, sinks, head_dim] each
        self.sink_index: Tensor | None = None  # [batch, sinks] int64 token index, -1 where not yet seen
        self.shape: tuple[int, int, int] | None = None  # batch, kv_heads, head_dim

    @property
    def length(self) -> int:
        """Tokens of the sequence so far, padding and forgotten ones included."""
        tail = self.tail[0].tokens if self.tail else 0
        recent = self.recent[0].shape[2] if self.recent else 0
        return self.first + self.sealed + tail + recent

    def parts(self) -> dict[str, list[Tensor]]:
        """All tensors that are held, each once, by what they are for."""
        pages = {id(page): page for page in (*(column.page for column in self.columns), self.growing) if page}
        sides = [side for page in pages.values() for side in (page.keys, page.values)]
        return {
            "codes": [plane for side in sides for plane in side.planes],
            "scales": [part for side in sides for part in side.ranges.values()],
            "outliers": [part for side in sides for part in side.outliers()],
            "tail": [tensor for part in self.tail or () for tensor in part.tensors()],
            "window": [*(self.recent or ()), *([] if self.recent_skip is None else [self.recent_skip])],
            "sinks": [*(self.sink_numbers or ()), *([] if self.sink_index is None else [self.sink_index])],
            "slots": [column.slots for column in self.columns],
        }

    def tensors(self) -> list[Tensor]:
        """All tensors that are held, each once."""
        return [tensor for held in self.parts().values() for tensor in held]

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> None:
        """Store new tokens.

        keys, values: [batch, kv_heads, new, head_dim]. valid: [batch, new] bool, False for padding; None if all count.
        Raises CacheUseError if batch, heads or head_dim differ from what is held, ActivationError on NaN and infinity.
        """
        shape = (keys.shape[0], keys.shape[1], keys.shape[3])
        if self.shape is not None and shape != self.shape:
            raise CacheUseError(
                f"This cache holds batch {self.shape[0]}, {self.shape[1]} KV heads of {self.shape[2]}, but got batch "
                f"{shape[0]}, {shape[1]} heads of {shape[2]}; call cache.reset() or make a new cache."
            )
        for numbers in (keys, values):  # before anything is stored, so that a refusal leaves all as it was
            require_finite(numbers, "Keys or values")
        skip = torch.zeros(shape[0], keys.shape[2], dtype=torch.bool, device=keys.device) if valid is None else ~valid
        sinks = self._find_sinks(skip)
        before, self.shape = self.length, shape
        self._append(keys, values, skip)
        if sinks is not None:
            self._take_sinks(keys, values, before, *sinks)

    def _append(self, keys: Tensor, values: Tensor, skip: Tensor) -> None:
        """Encode what leaves the exact window, and keep the rest."""
        if self.window == 0 and self.together == 1:
            return self._encode(keys, values, skip, keys.shape[2])
        if self.recent is not None and self.recent_skip is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.recent, (keys, values), strict=True))
            skip = torch.cat([self.recent_skip, skip], dim=1)
        leaving = max(keys.shape[2] - self.window, 0) // self.together * self.together
        if leaving:
            self._encode(keys, values, skip, leaving)
        self.recent = (keys[:, :, leaving:].clone(), values[:, :, leaving:].clone())
        self.recent_skip = skip[:, leaving:].clone()

    def _find_sinks(self, skip: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Row, token and place of the first real tokens of each sequence, which are then skipped too, being kept exact.

        skip: [batch, new] bool, padding; changed in place.
        """
        if self.sinks == 0 or (self.sink_index is not None and bool((self.sink_index[:, -1] >= 0).all())):
            return None
        have = skip.new_zeros(len(skip), dtype=torch.int64) if self.sink_index is None else (self.sink_index >= 0).sum(1)
        rank = have[:, None] + (~skip).cumsum(1) - 1  # of each real token within its sequence
        row, token = ((rank < self.sinks) & ~skip & (have < self.sinks)[:, None]).nonzero(as_tuple=True)
        skip[row, token] = True
        return row, token, rank[row, token]

    def _take_sinks(self, keys: Tensor, values: Tensor, before: int, row: Tensor, token: Tensor, place: Tensor) -> None:
        """Keep the sinks among new tokens, which follow `before` others."""
        batch, heads, _, dim = keys.shape
        if self.sink_index is None:
            self.sink_index = torch.full((batch, self.sinks), -1, dtype=torch.int64, device=keys.device)
            blank = keys.new_zeros(batch, heads, self.sinks, dim)
            self.sink_numbers = (blank, blank.clone())
        assert self.sink_numbers is not None
        self.sink_index[row, place] = token + before
        for held, numbers in zip(self.sink_numbers, (keys, values), strict=True):
            held[row, :, place] = numbers[row, :, token]

    def _encode(self, keys: Tensor, values: Tensor, skip: Tensor, new: int) -> None:
        """Quantise the first `new` tokens tile by tile; every whole block is sealed, the rest becomes the tail."""
        batch, heads, _, dim = keys.shape
        tile = max(TILE_NUMBERS // (batch * heads * dim) // BLOCK, 1) * BLOCK
        to_seal = ((self.tail[0].tokens if self.tail else 0) + new) // BLOCK
        page: Page | None = None
        start = 0
        while start < new:
            stop = min(start + tile - (self.tail[0].tokens if self.tail else 0), new)
            pair = tuple(
                quantizer.encode(numbers[:, :, start : stop + ahead], skip[:, start : stop + ahead])
                for quantizer, numbers, ahead in zip(self.quantizers, (keys, values), self.ahead, strict=True)
            )
            if self.tail:
                pair = tuple(Encoded.cat([old, fresh]) for old, fresh in zip(self.tail, pair, strict=True))
            whole = pair[0].tokens // BLOCK * BLOCK
            if whole:
                blocks = [to_blocks(part.slice(0, whole)) for part in pair]
                page = page or self._page(to_seal, blocks[0], blocks[1])
                slots = torch.tensor(page.put(blocks[0], blocks[1])).view(-1, batch)
                self.columns += [Column(page, column.clone(), BLOCK) for column in slots]
                self.sealed += whole
            rest = [part.slice(whole, part.tokens) for part in pair] if whole else pair
            self.tail = (rest[0], rest[1]) if rest[0].tokens else None
            start = stop
        if page:
            page.commit()

    def _seal_tail(self, count: int) -> None:
        """Make a block of the tail, of which only the first `count` tokens count: a group cannot be cut."""
        assert self.tail is not None and self.shape is not None
        blocks = [to_blocks(part.padded(BLOCK)) for part in self.tail]
        page = self._page(1, blocks[0], blocks[1])
        slots = torch.tensor(page.put(blocks[0], blocks[1]))
        page.commit()
        self.columns.append(Column(page, slots, count))
        self.sealed += count

    def _page(self, columns: int, keys: Encoded, values: Encoded) -> Page:
        """A page for `columns` columns, of which these are the first: one just large enough where many come at once,
        one with room to grow where they come singly.
        """
        assert self.shape is not None
        batch, room = self.shape[0], columns
        if columns == 1:
            if self.growing and self.growing.fits(keys, values):
                return self.growing
            room = max(len(self.columns) // GROWTH, 1)
        sides = []
        for quantizer, blocks in zip(self.quantizers, (keys, values), strict=True):
            found = len(blocks.outlier_index) if blocks.outlier_index is not None else 0
            outlier_room = 0 if room == columns else (found + found // 8 + 1) * room
            sides.append(PackedSide.allocate(quantizer, room * batch, blocks, keys=blocks is keys, outlier_room=outlier_room))
        page = Page(room * batch, sides[0], sides[1])
        if columns == 1:
            self.growing = page
        return page

    def tiles(self, stop: int | None = None, *, unsealed: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Decode the tokens held before `stop` (all by default), or of those the `unsealed` alone, piece by piece.

        Yields (index of the first token, keys, values) with keys and values [batch, kv_heads, tokens, head_dim] float32,
        or in the model's dtype where they are exact; sinks are put in place.
        """
        stop = self.length if stop is None else min(stop, self.length)
        start = self.first + (self.sealed if unsealed else 0)
        for pair in self._pieces(stop, unsealed):
            count = min(pair[0].shape[2], stop - start)
            if count <= 0:
                return
            keys, values = (part[:, :, :count] for part in pair)
            self._put_sinks(start, keys, values)
            yield start, keys, values
            start += count

    def _pieces(self, stop: int, unsealed: bool) -> Iterator[tuple[Tensor, ...]]:
        start, i = self.first, len(self.columns) if unsealed else 0
        while i < len(self.columns) and start < stop:
            assert self.shape is not None
            first = self.columns[i]
            limit = max(TILE_NUMBERS // (BLOCK * self.shape[0] * self.shape[1] * self.shape[2]), 1)
            run = [first]
            while len(run) < limit and i + len(run) < len(self.columns) and start + len(run) * BLOCK < stop:
                following = self.columns[i + len(run)]
                if following.page is not first.page or run[-1].count < BLOCK:
                    break
                run.append(following)
            slots = torch.cat([column.slots for column in run])
            tokens = (len(run) - 1) * BLOCK + run[-1].count
            yield tuple(
                from_blocks(quantizer.decode(side.take(slots)), self.shape[0])[:, :, :tokens]
                for quantizer, side in zip(self.quantizers, (first.page.keys, first.page.values), strict=True)
            )
            start += tokens
            i += len(run)
        if self.tail:
            yield tuple(q.decode(part).clone() for q, part in zip(self.quantizers, self.tail, strict=True))
        if self.recent:
            yield tuple(part.clone() for part in self.recent)

    def _put_sinks(self, start: int, keys: Tensor, values: Tensor) -> None:
        if self.sink_index is None or self.sink_numbers is None:
            return
        inside = (self.sink_index >= start) & (self.sink_index < start + keys.shape[2])
        row, place = inside.nonzero(as_tuple=True)
        token = self.sink_index[row, place] - start
        for numbers, held in zip((keys, values), self.sink_numbers, strict=True):
            numbers[row, :, token] = held[row, :, place].to(numbers.dtype)

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
            self.tail = (self.tail[0].rows(rows), self.tail[1].rows(rows))
        if self.recent:
            self.recent = (self.recent[0][rows], self.recent[1][rows])
        if self.sink_numbers:
            self.sink_numbers = (self.sink_numbers[0][rows], self.sink_numbers[1][rows])
        self.sink_index, self.recent_skip = (
            None if part is None else part[rows] for part in (self.sink_index, self.recent_skip)
        )
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
        if length > 0 and oldest < self.first:
            raise CacheUseError(
                f"A sliding-window layer has forgotten its first {self.first} tokens, so the cache cannot be cropped to "
                f"{length}; call cache.reset() and read the text again."
            )

    def crop(self, length: int) -> None:
        """Drop all tokens from `length` on; a block that is cut keeps its codes and counts fewer tokens.

        Raises CacheUseError where tokens before `length` were forgotten that whoever goes on from there would read.
        """
        self.require_croppable(length, length - 1)
        if length == 0 and self.first:
            return self.reset()
        drop = max(self.length - length, 0)
        if self.recent and self.recent_skip is not None:
            keep = max(self.recent[0].shape[2] - drop, 0)
            drop -= self.recent[0].shape[2] - keep
            self.recent = (self.recent[0][:, :, :keep].clone(), self.recent[1][:, :, :keep].clone())
            self.recent_skip = self.recent_skip[:, :keep].clone()
        if self.tail and drop:
            keep = max(self.tail[0].tokens - drop, 0)
            drop -= self.tail[0].tokens - keep
            if keep % self.together:
                self._seal_tail(keep)
                keep = 0
            self.tail = (self.tail[0].slice(0, keep), self.tail[1].slice(0, keep)) if keep else None
        while drop and self.columns:
            last = self.columns.pop()
            taken = min(last.count, drop)
            self.sealed -= taken
            drop -= taken
            if taken < last.count:
                self.columns.append(replace(last, count=last.count - taken))
        if self.sink_index is not None:
            self.sink_index[self.sink_index >= length] = -1
