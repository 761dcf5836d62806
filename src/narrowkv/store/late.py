"""A store that begins with later tokens than the first, as one does whose window has slid past those before."""

import torch
from torch import Tensor

from narrowkv.store.layer import LayerStore
from narrowkv.store.page import BLOCK


def begin_late(store: LayerStore, keys: Tensor, values: Tensor, missing: int, valid: Tensor | None = None) -> None:
    """Begin an empty store with tokens that follow `missing` others, as if those had come and been evicted.

    keys, values: [batch, kv_heads, new, head_dim]. valid: [batch, missing + new] bool, False for padding; None if all count.
    Raises as `LayerStore.append`.
    """
    gap = missing % BLOCK
    store.first, store.missing = missing - gap, missing  # so that the same tokens share a block
    if valid is None:
        valid = keys.new_ones(len(keys), missing + keys.shape[2], dtype=torch.bool)
    sinks = store.sinks.find(~valid[:, :missing])
    if sinks is not None:
        gone = [part[:, :, :1].expand(-1, -1, missing, -1) for part in (keys, values)]
        store.sinks.take(gone[0], gone[1], 0, sinks)
    valid = torch.cat([valid.new_zeros(len(valid), gap), valid[:, missing:]], dim=1)
    keys, values = (torch.cat([part[:, :, :1].expand(-1, -1, gap, -1), part], dim=2) for part in (keys, values))
    store.append(keys, values, valid)
