"""Pages of an inference engine's own memory, which hold the streams, outliers and the exact first token of 128 tokens.

A page holds two blocks of 64 tokens of one sequence, keys and values of all heads. Tokens are written as they come, each into
its column of the streams, so that no tail is open anywhere else; a block begins anew whenever its first token is written, and
tokens written again (rejected drafts) replace what was there. A page means the same wherever it lies: engines share it between
sequences, and copy it as bytes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.codec import TrellisQuantizer
from narrowkv.codec.cpu.encode import KINDS
from narrowkv.codec.ranges import require_finite
from narrowkv.codec.scheme_parts import BLOCK
from narrowkv.codec.trellis import FEW, KERNELS
from narrowkv.errors import RecipeError
from narrowkv.store.page_layout import PageLayout
from narrowkv.store.page_views import SideViews
from narrowkv.store.runs import BLOCKS, PAGE, NewTokens, RotaryEmbedding, RunGroup

TILE = 16  # blocks that are dequantized at a time


class PagedLayer:
    """The pages of one layer. memory: [pages, bytes] uint8, of which `layout` describes each row; a row is contiguous.

    rope: rotates keys; those that come are rotated, those that are stored are not, but for the first token. compiled: the
    same for compiled code.
    Raises RecipeError where pages are too small.
    """

    def __init__(
        self,
        quantizers: tuple[TrellisQuantizer, TrellisQuantizer],
        rope: RotaryEmbedding | None,
        memory: Tensor,
        sink_dtype: torch.dtype,
    ):
        self.quantizers, self.rope, self.memory = quantizers, rope, memory
        self.layout = layout = PageLayout.of(quantizers, sink_dtype)
        if memory.shape[1] < layout.nbytes:
            raise RecipeError(
                f"A page of {PAGE} tokens takes {layout.nbytes} bytes, and the engine's has {memory.shape[1]}; "
                "calibrate with equal layers."
            )
        self._encoders = [quantizer.encoder for quantizer in quantizers]
        self.sides = tuple(SideViews(memory, layout, side) for side in layout.sides)
        self.compiled = _kernels.Pages(
            memory=memory.data_ptr(),
            count=len(memory),
            stride=memory.stride(0),
            block_bytes=layout.block_bytes,
            sink=[layout.sink, KINDS[sink_dtype]],
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            sides=[
                [side.streams, side.stream_bytes, side.offsets, side.values, side.index, side.budget] for side in layout.sides
            ],
        )

    def append(self, new: NewTokens, keys: Tensor, values: Tensor) -> None:
        """Encode new tokens [tokens, kv_heads, head_dim], keys rotated, into their pages; raises ActivationError on NaN, and
        on outliers that do not fit float16.
        """
        for group in new.groups:
            if not self._write(new, group, keys, values):
                self._append_naive(new, group, keys, values)
            self._put_sinks(group, keys, values)

    def append_naive(self, new: NewTokens, keys: Tensor, values: Tensor) -> None:
        """The same in plain torch."""
        for group in new.groups:
            self._append_naive(new, group, keys, values)
            self._put_sinks(group, keys, values)

    def _write(self, new: NewTokens, group: RunGroup, keys: Tensor, values: Tensor) -> bool:
        """Whether compiled code wrote a group, and had nothing to object to."""
        of_keys, of_values = self._encoders
        readable = keys.dtype in KINDS and len(keys) == len(values) == len(new.positions)
        if of_keys is None or of_values is None or not readable:
            return False
        return not self.compiled.write(
            of_keys.codec,
            of_values.codec,
            KERNELS[0],
            len(keys),
            place(keys),
            place(values),
            (0, 0, 0) if self.rope is None else new.unrotation(self.rope, keys.dtype).place,
            group.place,
            1 if len(keys) * self.layout.kv_heads <= FEW else torch.get_num_threads(),
        )

    def _append_naive(self, new: NewTokens, group: RunGroup, keys: Tensor, values: Tensor) -> None:
        require_finite("Keys or values", keys[None], values[None])
        for run in group.runs:
            rows = slice(run.start, run.start + run.tokens)
            of_keys, of_values = (side[rows].transpose(0, 1) for side in (keys, values))
            if self.rope is not None:
                of_keys = self.rope.unrotate(of_keys[None], new.positions[None, rows])[0]
            for views, quantizer, x in zip(self.sides, self.quantizers, (of_keys, of_values), strict=True):
                views.put(run, quantizer, x.float())

    def _put_sinks(self, group: RunGroup, keys: Tensor, values: Tensor) -> None:
        for run in group.runs:
            if run.position == 0:
                self.sink(run.page).copy_(torch.stack([keys[run.start], values[run.start]]))

    def sink(self, page: int) -> Tensor:
        """The first token's key, rotated, and value in a page: [2, kv_heads, head_dim]."""
        layout = self.layout
        return self.memory[page, layout.sink : layout.nbytes].view(layout.sink_dtype).view(2, layout.kv_heads, layout.head_dim)

    def dequantize(self, pages: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The tokens from `start`, where a block begins, to before `stop` of a sequence whose pages are these [n] int64.

        Returns keys, not rotated, and values, [1, kv_heads, tokens, head_dim] float32, the first token as it came.
        """
        blocks = torch.arange(start // BLOCK, -(-stop // BLOCK), dtype=torch.int64, device="cpu")
        where = (pages[blocks // BLOCKS], blocks % BLOCKS)
        found = [
            quantizer.dequantize(views.take(*where)).transpose(0, 1).flatten(1, 2)[None]
            for quantizer, views in zip(self.quantizers, self.sides, strict=True)
        ]
        keys, values = (part[:, :, : stop - start].contiguous() for part in found)
        if start == 0:
            key, value = self.sink(int(pages[0]))[:, None, :, None]
            at = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
            keys[:, :, :1], values[:, :, :1] = key if self.rope is None else self.rope.unrotate(key, at), value
        return keys, values


def place(elements: Tensor) -> tuple[int, int, int, int]:
    """Where elements [tokens, heads, head_dim] lie, of what kind, and strides of tokens and heads, for compiled code."""
    strides = elements.stride()
    assert strides[2] == 1
    return elements.data_ptr(), KINDS[elements.dtype], strides[0], strides[1]


class PagedSequence:
    """A sequence in pages, to be read like a `LayerStore`. pages: [n] int64. first: where what is stored begins."""

    def __init__(self, layer: PagedLayer, pages: Tensor, first: int = 0):
        self.layer, self.pages, self.first = layer, pages, first

    def tiles(self, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As `LayerStore.tiles`."""
        for start in range(self.first, stop, TILE * BLOCK):
            yield start, *self.layer.dequantize(self.pages, start, min(start + TILE * BLOCK, stop))

    def read(self, stop: int) -> tuple[Tensor, Tensor]:
        """As `LayerStore.read`."""
        return self.layer.dequantize(self.pages, self.first, stop)
