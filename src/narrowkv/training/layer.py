"""TrainingCache: quantizes keys and values of one forward pass, with gradients, and stores nothing from one to the next."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from narrowkv.codec.straight_through import depends_on_outliers, passing, substitute
from narrowkv.codec.surroundings import undisturbed
from narrowkv.integrations import PackedCache
from narrowkv.integrations.hold import not_traced
from narrowkv.integrations.hooks import LazyMask, model_attention, require_inputs
from narrowkv.integrations.layer import PackedLayer
from narrowkv.store import LayerStore


class TrainingLayer(PackedLayer):
    """A packed layer that stores the tokens of one call, reads them with gradients, and is empty again.

    A layer that gradient checkpointing runs twice finds the same twice.
    """

    @not_traced
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Quantize all tokens of a text; key_states and value_states: [batch, kv_heads, tokens, head_dim], keys not rotated.

        Raises ActivationError where these are NaN or infinite.
        """
        inputs, self.inputs = require_inputs(self.inputs), None
        with undisturbed(gradients=True):
            rope_state = self.rope.keep(inputs.positions, inputs.tables) if self.rope else None
            stored = key_states if self.rotates_on_read else self.rotate(key_states, rope_state, inputs.precision)
            self._clear()
            with torch.no_grad():
                self._store(inputs, rope_state, stored, value_states)
                decoded = self.store.read()
            keys, values = (
                substitute(_passing(self.store, side, x), elements)
                for side, (x, elements) in enumerate(zip((stored, value_states), decoded, strict=True))
            )
            if self.rotates_on_read:
                keys = self.rotate(keys, rope_state)
            self._clear()
        handle = TrainingHandle(self, rope_state, keys, values)
        return handle, handle

    def _clear(self) -> None:
        self.store.reset()
        if self.position_buffer:
            self.position_buffer.reset()


def _passing(store: LayerStore, side: int, x: Tensor) -> Tensor:
    """A tensor like x, in float32 at least, whose gradient flows to the elements of x that a store has not saturated.

    side: 0 for keys, 1 for values. x: [batch, kv_heads, tokens, head_dim], as they were stored.
    """
    quantizer = store.quantizers[side]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    encoded, window = wide[:, :, : store.packed], wide[:, :, store.packed :]
    outliers = _outliers(store, side) if store.packed and depends_on_outliers(quantizer) else None
    found = torch.cat([passing(quantizer, encoded, outliers), window], dim=2)
    if store.sinks.index is None:
        return found
    row, slot = (store.sinks.index >= 0).nonzero(as_tuple=True)
    exact = x.new_zeros(len(x), 1, x.shape[2], 1, dtype=torch.bool)
    exact[row, :, store.sinks.index[row, slot]] = True
    return torch.where(exact, wide, found)


def _outliers(store: LayerStore, side: int) -> Tensor:
    """Which codes of the encoded tokens outliers replace: [batch, kv_heads, tokens, positions] bool."""
    blocks = [(entry.page.keys, entry.page.values)[side].take(entry.slots) for entry in store.blocks.columns]
    if store.tail and store.tail.tokens:
        blocks.append(store.tail.encoded()[side])
    return torch.cat([block.outlier_mask() for block in blocks], dim=2)


@dataclass(frozen=True)
class TrainingHandle:
    """Quantized keys, rotated, and values of one text: [batch, kv_heads, tokens, head_dim]. rope_state: what rotates them."""

    layer: TrainingLayer
    rope_state: Tensor | None
    keys: Tensor
    values: Tensor

    def to(self, device: torch.device) -> "TrainingHandle":
        """Itself: transformers before 5.22 sends what layers share to the device where it is read."""
        return self

    @not_traced
    def attend(self, module: nn.Module, query: Tensor, mask: LazyMask, scaling: float, **kwargs: Any) -> Tensor:
        """The model's own attention for query [batch, query_heads, tokens, head_dim], not rotated, with its dropout.

        Scores with a softcap or sink logits are the eager implementation's, as fused ones leave these out.
        """
        plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
        implementation = None if plain else "eager"
        with undisturbed(gradients=True):
            precise = query.to(torch.promote_types(query.dtype, torch.float32))
            rotated = self.layer.rotate(precise, self.rope_state).to(query.dtype)
            keys, values = (side.to(query.dtype) for side in (self.keys, self.values))
            output, _ = model_attention(module, rotated, keys, values, mask, implementation, scaling=scaling, **kwargs)
        return output.to(query.dtype)


class TrainingCache(PackedCache):
    """The layers, tables and rotary embeddings of a strict PackedCache, for `quantized_attention`."""

    layer_kind: ClassVar[type[PackedLayer]] = TrainingLayer
