"""Sealed blocks: their version tells whoever has looked at them whether they are still those."""

import pytest
import torch

from narrowkv import get_recipe
from narrowkv.store import LayerStore


@pytest.fixture
def store():
    store = LayerStore(*get_recipe("int4").quantizers(0))
    store.append(*torch.randn(2, 2, 1, 200, 16))
    return store


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.append(*torch.randn(2, 2, 1, 60, 16)),
        lambda store: store.evict(64),
        lambda store: store.crop(130),
        lambda store: store.select(torch.tensor([1, 0])),
        lambda store: store.reset(),
    ],
    ids=["seal", "forget", "crop", "select", "reset"],
)
def test_operations_that_change_blocks_raise_their_version(store, change):
    before = store.blocks.version
    change(store)
    assert store.blocks.version > before


def test_operations_that_leave_blocks_unchanged_leave_their_version(store):
    before = store.blocks.version
    store.append(*torch.randn(2, 2, 1, 3, 16))
    store.crop(195)
    store.evict(63)
    assert store.blocks.version == before and store.blocks.tokens == 192
