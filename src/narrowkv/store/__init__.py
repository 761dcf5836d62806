"""Packed storage: pages, blocks, tail, sinks."""

from narrowkv.store.block_table import addresses
from narrowkv.store.layer import LayerStore
from narrowkv.store.page import BLOCK
from narrowkv.store.plans import Plans
from narrowkv.store.positions import PositionBuffer

__all__ = ["BLOCK", "LayerStore", "Plans", "PositionBuffer", "addresses"]
