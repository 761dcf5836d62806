"""A cache that stores nothing: keys and values pass a listener, and the model's own attention goes on with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowkv.attention import AnyRope
from narrowkv.codec.surroundings import undisturbed
from narrowkv.integrations.cpu_linear import lacks_products
from narrowkv.integrations.hooks import LayerInputs, NarrowCache, model_attention, require_inputs
from narrowkv.integrations.probe import EmptyLayer

# keys before and after the rotary embedding, values: all [batch, kv_heads, tokens, head_dim]; what has rotated the keys
Observer = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


class ObserverCache(NarrowCache):
    """What is stored is only shown to listeners. dense: the model is given plain tensors."""

    def __init__(self, layers: list[Any], dense: bool = False):
        self.dense = dense
        super().__init__(layers=layers)


class ObserverLayer(EmptyLayer):
    """Stores nothing; hands keys and values to a listener. dense: the model is given tensors, not a handle."""

    def __init__(self, rope: AnyRope | None, observer: Observer | None = None, dense: bool = False):
        super().__init__()
        self.rope = rope
        self.observer = observer
        self.dense = dense
        self.inputs: LayerInputs | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for elements in (key_states, value_states):
            if torch.is_grad_enabled() and not elements.requires_grad:
                elements.requires_grad_()
        inputs, rope_state, rotated = None, None, key_states
        if not self.dense:
            inputs, self.inputs = require_inputs(self.inputs), None
        with undisturbed(gradients=True):
            if inputs and self.rope:
                rope_state = self.rope.keep(inputs.positions, inputs.tables)
                rotated = self.rope.rotate(key_states, rope_state, inputs.precision)
            if self.observer:
                self.observer(key_states, rotated, value_states, rope_state)
        if inputs is None:
            return key_states, value_states
        handle = ObserverHandle(self.rope, rope_state, inputs.precision, rotated, value_states)
        return handle, handle


@dataclass(frozen=True)
class ObserverHandle:
    """Lets the model's own attention go on with what has passed. rope_state: what rotates the new tokens, in `precision` at
    least; keys are rotated.
    """

    rope: AnyRope | None
    rope_state: Tensor | None
    precision: torch.dtype | None
    keys: Tensor
    values: Tensor

    def to(self, device: torch.device) -> "ObserverHandle":
        """Itself: transformers before 5.22 sends what layers share to the device where it is read."""
        return self

    def attend(self, module: nn.Module, query: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Tensor:
        """Attention for query [batch, query_heads, queries, head_dim], not rotated."""
        if self.rope and self.rope_state is not None:
            with undisturbed(gradients=True):
                query = self.rope.rotate(query, self.rope_state[:, -query.shape[2] :], self.precision)
        tensors = query, self.keys, self.values
        if torch.is_grad_enabled() and lacks_products(query.dtype, query.device):  # the way back takes 15 times as long
            tensors = query.float(), self.keys.float(), self.values.float()
        output, _ = model_attention(module, *tensors, mask, scaling=scaling, **kwargs)
        return output.to(query.dtype)
