"""Packed storage: pages, blocks, tail, sinks."""

from narrowkv.store.addresses import addresses
from narrowkv.store.layer import LayerStore
from narrowkv.store.ledger import Ledger
from narrowkv.store.page import BLOCK

__all__ = ["BLOCK", "LayerStore", "Ledger", "addresses"]
