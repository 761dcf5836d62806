"""Whether new tokens go with those that a store holds."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from narrowkv.errors import CacheUseError

if TYPE_CHECKING:
    from narrowkv.store.layer import LayerStore


def fitting(store: "LayerStore", keys: Tensor, values: Tensor) -> tuple[tuple[int, int, int], tuple[torch.dtype, torch.dtype]]:
    """Batch, KV heads and head_dim of new keys and values, and their dtypes; raises CacheUseError where others are held."""
    shape, dtypes = (keys.shape[0], keys.shape[1], keys.shape[3]), (keys.dtype, values.dtype)
    if store.shape is not None and shape != store.shape:
        raise CacheUseError(
            f"This cache holds batch {store.shape[0]}, {store.shape[1]} KV heads of {store.shape[2]}, but got batch "
            f"{shape[0]}, {shape[1]} heads of {shape[2]}; call cache.reset() or make a new cache."
        )
    if store.dtypes is not None and dtypes != store.dtypes:
        held, got = ("keys in {} and values in {}".format(*pair).replace("torch.", "") for pair in (store.dtypes, dtypes))
        raise CacheUseError(
            f"This cache holds {held}, but got {got}; go on as it was begun (autocast, the model's dtype), or call "
            "cache.reset()."
        )
    return shape, dtypes
