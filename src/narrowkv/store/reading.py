"""What a store holds, decoded piece by piece."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from narrowkv.store.page import BLOCK, from_blocks
from narrowkv.store.sinks import put_sinks

if TYPE_CHECKING:
    from narrowkv.store.layer import LayerStore

# numbers encoded or decoded at a time, which bounds the memory of intermediate results; on a GPU, where each launch costs time
TILE_NUMBERS, GPU_TILE_NUMBERS = 2**19, 2**23
MOST_BLOCKS = 512  # encoded at a time: a GPU launches fewer than 65,536 programs along tokens


def tile_numbers(device: torch.device) -> int:
    """How many numbers are encoded or decoded at a time."""
    return GPU_TILE_NUMBERS if device.type == "cuda" else TILE_NUMBERS


def tile_tokens(store: "LayerStore", keys: Tensor) -> int:
    """How many tokens, whole blocks of them, are encoded at a time."""
    return min(max(tile_numbers(keys.device) // keys[:, :, 0].numel() // BLOCK, 1), MOST_BLOCKS) * BLOCK


def tiles(store: "LayerStore", stop: int, unsealed: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`LayerStore.tiles`."""
    start = store.first + (store.sealed if unsealed else 0)
    for pair in _pieces(store, stop, unsealed):
        count = min(pair[0].shape[2], stop - start)
        if count <= 0:
            return
        keys, values = (part[:, :, :count] for part in pair)
        if store.sink_index is not None and store.sink_numbers is not None:
            put_sinks(start, (keys, values), store.sink_index, store.sink_numbers)
        yield start, keys, values
        start += count


def _pieces(store: "LayerStore", stop: int, unsealed: bool) -> Iterator[tuple[Tensor, ...]]:
    start, i = store.first, len(store.columns) if unsealed else 0
    while i < len(store.columns) and start < stop:
        assert store.shape is not None
        first = store.columns[i]
        limit = max(tile_numbers(first.page.device) // (BLOCK * store.shape[0] * store.shape[1] * store.shape[2]), 1)
        run = [first]
        while len(run) < limit and i + len(run) < len(store.columns) and start + len(run) * BLOCK < stop:
            following = store.columns[i + len(run)]
            if following.page is not first.page or run[-1].count < BLOCK:
                break
            run.append(following)
        slots = torch.cat([column.slots for column in run])
        tokens = (len(run) - 1) * BLOCK + run[-1].count
        pair = tuple(
            from_blocks(quantizer.decode(side.take(slots)), store.shape[0])[:, :, :tokens]
            for quantizer, side in zip(store.quantizers, (first.page.keys, first.page.values), strict=True)
        )
        yield _with_bias(store, pair, start)
        start += tokens
        i += len(run)
    if store.tail and store.tail.tokens:
        yield _with_bias(store, store.tail.decode(), store.first + store.sealed)
    if store.recent.tokens:
        yield tuple(part.clone() for part in store.recent.held()[:2])


def _with_bias(store: "LayerStore", pair: tuple[Tensor, ...], start: int) -> tuple[Tensor, ...]:
    """Decoded keys and values, the first of which is the token `start`, with what was taken out; changed in place."""
    keys, values = pair
    constant = store.bias.of_keys(start, keys.shape[2])
    if constant is not None:
        keys += constant
    if store.bias.values is not None:
        values += store.bias.values[:, None]
    return keys, values
