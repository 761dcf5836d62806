"""A cache that stores nothing: keys and values pass a listener, and the model's own attention goes on with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowkv.attention import AnyRope
from narrowkv.codec.surroundings import undisturbed
from narrowkv.integrations.interface import NarrowCache, Step, model_attention, require_step
from narrowkv.integrations.probe import EmptyLayer
from narrowkv.integrations.products import lacks_products

# keys before and after the rotary embedding, values: all [batch, kv_heads, tokens, head_dim]; what has turned the keys
Listener = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


class PassingCache(NarrowCache):
    """What is stored is only shown to listeners. dense: the model is given plain tensors."""

    def __init__(self, layers: list[Any], dense: bool = False):
        self.dense = dense
        super().__init__(layers=layers)


class PassingLayer(EmptyLayer):
    """Stores nothing; hands keys and values to a listener. dense: the model is given tensors, not a handle."""

    def __init__(self, rope: AnyRope | None, listener: Listener | None = None, dense: bool = False):
        super().__init__()
        self.rope = rope
        self.listener = listener
        self.dense = dense
        self.step: Step | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for numbers in (key_states, value_states):
            if torch.is_grad_enabled() and not numbers.requires_grad:
                numbers.requires_grad_()
        step, kept, rotated = None, None, key_states
        if not self.dense:
            step, self.step = require_step(self.step), None
        with undisturbed(gradients=True):
            if step and self.rope:
                kept = self.rope.keep(step.positions, step.tables)
                rotated = self.rope.rotate(key_states, kept, step.precision)
            if self.listener:
                self.listener(key_states, rotated, value_states, kept)
        if step is None:
            return key_states, value_states
        handle = PassingHandle(self.rope, kept, step.precision, rotated, value_states)
        return handle, handle


@dataclass(frozen=True)
class PassingHandle:
    """Lets the model's own attention go on with what has passed. kept: what turns the new tokens, in `precision` at least;
    keys are rotated.
    """

    rope: AnyRope | None
    kept: Tensor | None
    precision: torch.dtype | None
    keys: Tensor
    values: Tensor

    def to(self, device: torch.device) -> "PassingHandle":
        """Itself: transformers before 5.22 sends what layers share to the device where it is read."""
        return self

    def attend(self, module: nn.Module, query: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Tensor:
        """Attention for query [batch, query_heads, queries, head_dim], not rotated."""
        if self.rope and self.kept is not None:
            with undisturbed(gradients=True):
                query = self.rope.rotate(query, self.kept[:, -query.shape[2] :], self.precision)
        tensors = query, self.keys, self.values
        if torch.is_grad_enabled() and lacks_products(query.dtype, query.device):  # the way back takes 15 times as long
            tensors = query.float(), self.keys.float(), self.values.float()
        output, _ = model_attention(module, *tensors, mask, scaling=scaling, **kwargs)
        return output.to(query.dtype)
