"""The dense path, chosen by name: the cache dequantizes a layer's whole past at every step and hands plain tensors to the
model.

For models that compute attention by themselves (Falcon, GPT-J, Bloom, MPT). The cache is as small as ever, but a step costs
the time and, for one layer at a time, the memory of the dequantized past. Keys arrive after the model's rotary embedding, so
recipes that store them before it do not fit; their `-postrope` references do.
"""

from typing import Any

import torch
from torch import Tensor

from narrowkv.codec.surroundings import undisturbed
from narrowkv.integrations.hooks import valid_tokens
from narrowkv.integrations.layer import PackedLayer


class DenseLayer(PackedLayer):
    """A packed layer whose `update` returns its contents as plain tensors."""

    padding: Tensor | None = None  # [batch, tokens] bool, of the coming step

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens [batch, kv_heads, new, head_dim]; returns keys and values of all stored tokens."""
        self.lazy_initialization(key_states, value_states)
        self.evict()
        past, new = self.store.length, key_states.shape[2]
        fresh, whole = (key_states, value_states), self.strict or self.is_exact
        with undisturbed(gradients=self.is_exact):
            self.store.append(*fresh, valid_tokens(self.padding, past, new))
            if past == 0 and not whole:
                return fresh
            stored = self.store.read(None if whole else past)
        with undisturbed(gradients=True):
            keys, values = (
                old.to(x.dtype) if whole else torch.cat([old.to(x.dtype), x], dim=2)
                for old, x in zip(stored, fresh, strict=True)
            )
        return keys, values
