"""LayerStore: the keys and values of one layer for one batch: sealed blocks, an open tail, sinks and an exact residual."""

from collections.abc import Iterator

import torch
from torch import Tensor

from narrowkv.codec import AnyQuantizer
from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.encode_buffer import AHEAD
from narrowkv.codec.outlier_counter import OutlierCounter
from narrowkv.codec.ranges import require_finite
from narrowkv.codec.saturation import Saturation
from narrowkv.errors import ActivationError, CacheUseError
from narrowkv.store.bias import Bias, Elements
from narrowkv.store.page import BLOCK, Dtypes, Page, Shape
from narrowkv.store.plans import Plans
from narrowkv.store.residual import ResidualWindow
from narrowkv.store.sealed import SealedBlocks, tile_tokens
from narrowkv.store.sinks import Sinks
from narrowkv.store.tail import Tail


class LayerStore:
    """Append-only packed storage of keys and values [batch, kv_heads, tokens, head_dim].

    sinks: the first real tokens of each sequence stay exact. residual_length: so do the newest (and a few more where several
    are encoded together). bias: subtracted from elements as they are encoded. An element is quantized once; `select` and
    `crop` move or drop codes. A GPU stores a few tokens without being waited for: the host (`prepare_step`, `advance`, `seal`)
    looks at no element, and what the device does (`write`) can be captured in a CUDA graph. plans: what backends read it by.
    """

    def __init__(
        self, keys: AnyQuantizer, values: AnyQuantizer, sinks: int = 0, residual_length: int = 0, bias: Bias | None = None
    ):
        self.quantizers = (keys, values)
        self.bias = bias or Bias()
        self.biased = self.bias.keys is not None or self.bias.values is not None
        self.residual_length = residual_length
        self.schemes = (keys.scheme, values.scheme)
        self.lookahead = [scheme.lookahead_tokens for scheme in self.schemes]
        # tokens leave the residual by this many, being encoded together
        self.tokens_per_group = max(scheme.tokens_per_group for scheme in self.schemes)
        self.has_residual = residual_length > 0 or self.tokens_per_group > 1  # whether new tokens stay exact at first
        self.blocks = SealedBlocks(self.quantizers)
        self.plans = Plans()
        self.sinks = Sinks(sinks)
        self.reset()

    def reset(self) -> None:
        """Remove all tokens; recipes and tables stay."""
        self.blocks.hold([])
        self.sinks.reset()
        self.saturation = Saturation()
        self.first = 0  # tokens evicted, all of them before those stored
        self.missing = 0  # first tokens whose elements never came; placeholders are stored for some of them
        self.tail: Tail | None = None
        self.residual = ResidualWindow(self.residual_length + self.tokens_per_group - 1)
        self.shape: Shape | None = None
        self.dtypes: Dtypes | None = None  # of the keys and the values that came, and of exact ones
        self.steps = False  # whether a GPU may store few tokens without being waited for

    def begin(self, shape: Shape, dtypes: Dtypes, device: torch.device) -> None:
        """Be the store of such tokens."""
        self.shape, self.dtypes, self.steps = shape, dtypes, cuda.runs_on(device)

    @property
    def length(self) -> int:
        """Tokens of the sequence so far, padding and evicted ones included."""
        return self.first + self.packed + self.residual.tokens

    @property
    def oldest(self) -> int:
        """The first token that is stored as it came."""
        return max(self.first, self.missing)

    @property
    def packed(self) -> int:
        """Number of stored tokens that are encoded."""
        return self.blocks.tokens + (self.tail.tokens if self.tail else 0)

    def parts(self) -> dict[str, list[Tensor]]:
        """All stored tensors, each once, by what they are for."""
        sides = [side for page in self.blocks.pages() for side in (page.keys, page.values)]
        return {
            "codes": [plane for side in sides for plane in side.planes],
            "scales": [part for side in sides for part in side.ranges.values()],
            "outliers": [part for side in sides for part in side.outliers()],
            "tail": self.tail.tensors() if self.tail else [],
            "window": self.residual.tensors(),
            "sinks": self.sinks.tensors(),
            "slots": [column.slots for column in self.blocks.columns],
            "bias": self.bias.tensors(),
        }

    def tensors(self) -> list[Tensor]:
        """All stored tensors, each once."""
        return [tensor for part in self.parts().values() for tensor in part]

    def fitting(self, keys: Tensor, values: Tensor) -> tuple[Shape, Dtypes]:
        """Shape and dtypes of new keys and values; raises CacheUseError if others are stored."""
        shape, dtypes = (keys.shape[0], keys.shape[1], keys.shape[3]), (keys.dtype, values.dtype)
        if self.shape is not None and shape != self.shape:
            raise CacheUseError(
                f"This cache has batch {self.shape[0]}, {self.shape[1]} KV heads of {self.shape[2]}, but got batch "
                f"{shape[0]}, {shape[1]} heads of {shape[2]}; call cache.reset() or make a new cache."
            )
        if self.dtypes is not None and dtypes != self.dtypes:
            stored, got = ("keys in {} and values in {}".format(*pair).replace("torch.", "") for pair in (self.dtypes, dtypes))
            raise CacheUseError(
                f"This cache stores {stored}, but got {got}; go on as it was begun (autocast, the model's dtype), or call "
                "cache.reset()."
            )
        return shape, dtypes

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> None:
        """Store new tokens.

        keys, values: [batch, kv_heads, new, head_dim]. valid: [batch, new] bool, False for padding; None if all count.
        Raises CacheUseError if batch, heads, head_dim or dtypes differ from what is stored, ActivationError on NaN and
        infinity; of single tokens on a GPU that are encoded without waiting for it, up to a block later.
        """
        shape, dtypes = self.fitting(keys, values)
        skip = None if valid is None else ~valid
        if self.steps and self.prepare_step(keys, values):
            self.write(keys, values, skip)
            self.advance(keys.shape[2])
            return self.seal()
        require_finite("Keys or values", keys, values)  # before anything is stored, so that a refusal leaves all as it was
        sinks = None
        if not self.sinks.found:
            skip = keys.new_zeros(shape[0], keys.shape[2], dtype=torch.bool) if skip is None else skip
            sinks = self.sinks.find(skip)
        if self.shape is None:
            self.begin(shape, dtypes, keys.device)
        try:
            if self.has_residual:
                self._shift(self._leaving(keys.shape[2]), keys, values, skip)
            else:
                self._encode(keys, values, skip, keys.shape[2])
        except ActivationError:
            self.reset() if self.length == 0 else None  # nothing was stored before either
            raise
        if sinks is not None:
            self.sinks.take(keys, values, self.length - keys.shape[2], sinks)

    def _shift(self, num_to_flush: int, keys: Tensor, values: Tensor, skip: Tensor | None) -> None:
        """Take new tokens into the exact window, and encode the oldest of all, which leave it."""
        if num_to_flush:
            self._encode(*self.residual.oldest(num_to_flush + max(self.lookahead), keys, values, skip), num_to_flush)
        self.residual.shift(num_to_flush, keys, values, skip)

    def _leaving(self, new: int) -> int:
        """How many tokens leave the exact window when this many come."""
        return max(self.residual.tokens + new - self.residual_length, 0) // self.tokens_per_group * self.tokens_per_group

    def _encode(self, keys: Tensor, values: Tensor, skip: Tensor | None, new: int) -> None:
        """Quantize the first `new` tokens: what fills the tail, whole blocks by tiles, a new tail; a refusal leaves none."""
        to_seal = ((self.tail.tokens if self.tail else 0) + new) // BLOCK
        page: Page | None = None
        start = 0
        try:
            while start < new:
                filled, left = self.tail.tokens if self.tail else 0, new - start
                whole = 0 if filled or left < BLOCK else min(tile_tokens(keys), left // BLOCK * BLOCK)
                stop = start + (whole or min(BLOCK - filled, left))
                parts = (keys, skip), (values, skip)
                if self.biased or stop - start < keys.shape[2]:
                    parts = self._unbiased(keys, values, skip, start, stop)
                saturation = self.saturation if keys.is_cpu and stop - start > 1 else None  # a GPU would be waited for
                if whole:
                    pair = (self.quantizers[0].encode(*parts[0], saturation), self.quantizers[1].encode(*parts[1], saturation))
                    page = self.blocks.seal(pair, page, to_seal)
                else:
                    self.tail = self.tail or Tail(self.quantizers, keys, values)
                    self.tail.append(parts[0], parts[1], stop - start, saturation)
                start = stop
                if self.tail and self.tail.tokens == BLOCK:
                    page = self._seal_tail(page, to_seal)
        except ActivationError:
            self._drop(start)
            raise
        finally:
            if page:
                page.commit()

    def _unbiased(self, keys: Tensor, values: Tensor, skip: Tensor | None, start: int, stop: int) -> tuple[Elements, Elements]:
        """The tokens from `start` to before `stop`, and those that are looked at ahead of them, without their bias."""
        cuts = [
            (part[:, :, start : stop + lookahead], None if skip is None else skip[:, start : stop + lookahead])
            for part, lookahead in zip((keys, values), self.lookahead, strict=True)
        ]
        parts = (cuts[0], cuts[1])
        if self.biased:
            key_bias = self.bias.key_bias(self.first + self.packed, parts[0][0].shape[2])
            parts = self.bias.subtract(*parts, key_bias, self.schemes)
        return parts

    def _seal_tail(self, page: Page | None = None, columns: int = 1) -> Page:
        """Pack the full tail, as `SealedBlocks.seal`; one that a GPU's steps write to stays where it is."""
        assert self.tail is not None
        sealed = self.blocks.seal(self.tail.block(), page, columns)
        if self.tail.stays:
            self.tail.clear()
        else:
            self.tail = None
        return sealed

    def prepare_step(self, keys: Tensor, values: Tensor) -> bool:
        """Whether new tokens, such as these, can be stored by a GPU that nobody waits for; if so, they fit.

        Those that leave the window for them are encoded before.
        """
        new = keys.shape[2]
        if new > AHEAD or not self.steps or not self.sinks.seen():
            return False
        if not self.has_residual:
            self.tail = self.tail or Tail(self.quantizers, keys, values)
            return self.tail.prepare_step(new)
        num_to_flush = self._leaving(new)
        if num_to_flush + max(self.lookahead) > self.residual.tokens:
            return False
        if num_to_flush:
            self._shift(num_to_flush, keys[:, :, :0], values[:, :, :0], None)
        self.residual.prepare_step(new, keys, values)
        return True

    def write(
        self,
        keys: Tensor,
        values: Tensor,
        skip: Tensor | None = None,
        offsets: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> None:
        """Store new tokens where `prepare_step` made space: behind those stored, or at `offsets` [2] int32 of tail and window.

        skip: [batch, new], if offsets are not given. key_bias: what is taken out of keys, where only the device knows where
        they are.
        """
        if self.has_residual:
            self.residual.step(keys, values, skip, offsets)
        elif self.tail:
            if offsets is None:
                key_bias = self.bias.key_bias(self.first + self.packed, keys.shape[2])
            self.tail.step(*self.bias.subtract((keys, skip), (values, skip), key_bias, self.schemes), offsets)

    def advance(self, new: int) -> None:
        """Count tokens that were, or will be, written."""
        if self.has_residual:
            self.residual.tokens += new
        elif self.tail:
            self.tail.tokens += new

    def seal(self) -> None:
        """Seal the tail if it is full; how many outliers it has is waited for."""
        if self.tail and self.tail.is_full:
            self._seal_tail().commit()

    def counters(self) -> list[OutlierCounter]:
        """Where a GPU counts what it finds."""
        found = [buffer.counter for buffer in self.tail.buffers] if self.tail else []
        return [counter for counter in (*found, self.residual.counter) if counter is not None]

    def tiles(self, stop: int | None = None, *, unsealed: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Dequantize the stored tokens before `stop` (all by default), or only the `unsealed` ones, tile by tile.

        Yields (index of the first token, keys, values) with keys and values [batch, kv_heads, tokens, head_dim] float32,
        or in the model's dtype where they are exact; sinks are put in place.
        """
        stop = self.length if stop is None else min(stop, self.length)
        start = self.first + (self.blocks.tokens if unsealed else 0)
        for pair in self._tensors_of_tiles(stop, unsealed):
            count = min(pair[0].shape[2], stop - start)
            if count <= 0:
                return
            keys, values = (part[:, :, :count] for part in pair)
            self.sinks.put(start, (keys, values))
            yield start, keys, values
            start += count

    def _tensors_of_tiles(self, stop: int, unsealed: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Of blocks, tail and window, free to be changed."""
        start = self.first
        for pair in () if unsealed else self.blocks.dequantize(stop - self.first):
            yield self.bias.restore(pair, start)
            start += pair[0].shape[2]
        if self.tail and self.tail.tokens:
            yield self.bias.restore(self.tail.dequantize(), self.first + self.blocks.tokens)
        if self.residual.tokens:
            keys, values, _ = self.residual.stored()
            yield keys.clone(), values.clone()

    def read(self, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """The stored tokens before `stop`, dequantized at once: keys, values [batch, kv_heads, stop - first, head_dim]."""
        tiles = [(keys, values) for _, keys, values in self.tiles(stop)]
        if not tiles:
            raise CacheUseError("There is nothing to read: the cache has no token yet.")
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*tiles, strict=True))
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Keep the sequences named by `rows` [n] int64, in that order, repeats allowed; sealed blocks are shared."""
        rows = rows.cpu()
        self.blocks.select(rows)
        if self.tail:
            self.tail.select(rows)
        self.residual.select(rows)
        self.sinks.select(rows)
        if self.shape:
            self.shape = (len(rows), *self.shape[1:])

    def evict(self, before: int) -> None:
        """Let go of whole blocks of tokens older than the token `before`; whoever calls knows that none will be read."""
        self.first += self.blocks.evict(before - self.first)

    def require_croppable(self, length: int, oldest: int) -> None:
        """Raise CacheUseError where the first `length` tokens cannot be continued: the token `oldest` was evicted."""
        if length > 0 and oldest < self.oldest:
            raise CacheUseError(
                f"A sliding-window layer has evicted its first {self.oldest} tokens, so the cache cannot be cropped to "
                f"{length}; call cache.reset() and read the text again."
            )

    def crop(self, length: int) -> None:
        """Drop all tokens from `length` on; a block that is cut keeps its codes and counts fewer tokens.

        Raises CacheUseError if tokens before `length` were evicted that the next tokens would read.
        """
        self.require_croppable(length, length - 1)
        if length == 0 and self.oldest:
            return self.reset()
        drop = max(self.length - length, 0)
        exact = min(drop, self.residual.tokens)
        self.residual.crop(self.residual.tokens - exact)
        self._drop(drop - exact)
        self.sinks.crop(length)

    def _drop(self, drop: int) -> None:
        """Drop this many of the newest encoded tokens."""
        if self.tail and drop:
            keep = max(self.tail.tokens - drop, 0)
            drop -= self.tail.tokens - keep
            self.tail.crop(keep)
            if keep % self.tokens_per_group:  # a group cannot be cut, but a block may count fewer tokens
                self.blocks.seal(self.tail.block(), None, 1, keep).commit()
            if keep % self.tokens_per_group or not keep:
                self.tail = None
        if drop:
            self.blocks.drop(drop)
