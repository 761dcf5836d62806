"""PackedLayer: one layer of a packed cache, and the handle that it gives to attention in place of tensors."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from narrowkv.attention import BACKENDS, AnyRope, AttentionInputs, Rope
from narrowkv.attention.cuda import decode as cuda
from narrowkv.codec.surroundings import undisturbed
from narrowkv.errors import CacheUseError, UnsupportedModelError
from narrowkv.integrations.hold import not_traced
from narrowkv.integrations.hooks import LayerInputs, LazyMask, model_attention, require_inputs
from narrowkv.store import LayerStore, PositionBuffer
from narrowkv.store.checks import as_count, as_rows


class PackedLayer(CacheLayerMixin):
    """One layer of a PackedCache.

    rope: rotates its keys, None where they are not rotated. position_buffer: what `rope` needs of each stored token, None
    where neither keys nor a bias are rotated when they are read. sliding_window: how many of the newest tokens a query of this
    layer sees, itself included, None for all; older ones are evicted.
    """

    def __init__(
        self,
        store: LayerStore,
        rope: AnyRope | None,
        position_buffer: PositionBuffer | None,
        backend: str,
        strict: bool,
        sliding_window: int | None,
    ):
        super().__init__()
        self.store = store
        self.rope = rope
        self.position_buffer = position_buffer
        self.backend = backend
        self.strict = strict
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        # whether elements are stored as the model's own attention wants them: not quantized, and keys rotated
        exact = all(quantizer.scheme.datatype == "exact" for quantizer in store.quantizers)
        self.is_exact = exact and not self.rotates_on_read
        # whether `crop` leaves no trace: tokens that have left an exact window cannot become exact again
        self.is_croppable = store.residual_length == 0 and store.tokens_per_group == 1
        self.inputs: LayerInputs | None = None
        self.device_lengths: Tensor | None = (
            None  # while a CUDA graph is captured: [cuda.NUM_LENGTHS + 4] int32, what its kernels are given
        )
        self.owns_positions = False  # whether, then, it is the first of those that share a position buffer

    @property
    def rotates_on_read(self) -> bool:
        """Whether keys are stored before the rotary embedding."""
        return self.rope is not None and self.store.quantizers[0].scheme.transform.pre_rope

    def rotate(self, x: Tensor, rope_state: Tensor | None, precision: torch.dtype | None = None) -> Tensor:
        """Rotate x: [batch, heads, new, head_dim] as the model's layer does, in no fewer bits than `precision` and x have."""
        return x if self.rope is None or rope_state is None else self.rope.rotate(x, rope_state, precision)

    def set_frequencies(self, inverse_frequencies: Tensor) -> None:
        """Rotate keys by other frequencies than so far; only while nothing is stored."""
        assert isinstance(self.rope, Rope)
        if not torch.equal(inverse_frequencies, self.rope.inverse_frequencies):
            self.rope = replace(self.rope, inverse_frequencies=inverse_frequencies)
            self.store.bias.rope = self.rope if self.store.bias.rope else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    @not_traced
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens; key_states and value_states: [batch, kv_heads, new, head_dim], keys not rotated."""
        inputs, self.inputs = require_inputs(self.inputs), None
        self.lazy_initialization(key_states, value_states)
        self.evict()
        with undisturbed(gradients=self.is_exact):
            rope_state = self.rope.keep(inputs.positions, inputs.tables) if self.rope else None
            stored = key_states if self.rotates_on_read else self.rotate(key_states, rope_state, inputs.precision)
            if self.device_lengths is None:
                past = self._store(inputs, rope_state, stored, value_states)
            else:
                past = self._store_captured(self.device_lengths, rope_state, stored, value_states)
        handle = PackedHandle(self, rope_state, inputs.precision, past, key_states, value_states)
        return handle, handle

    def _store(self, inputs: LayerInputs, rope_state: Tensor | None, keys: Tensor, values: Tensor) -> int:
        """Store new tokens; returns how many were stored before."""
        past, new = self.store.length, keys.shape[2]
        valid = inputs.valid(past, new)
        self.store.fitting(keys, values)
        with self._noted(past, rope_state, len(keys)):
            self.store.append(keys, values, valid)
        return past

    @contextlib.contextmanager
    def _noted(self, past: int, rope_state: Tensor | None, batch: int) -> Iterator[None]:
        """Within, the position buffer knows new tokens, which follow `past` others; it removes them again where they are
        refused.
        """
        position_buffer = self.position_buffer if self.position_buffer and self.position_buffer.length == past else None
        if position_buffer and rope_state is not None:
            position_buffer.append(rope_state.expand(batch, *rope_state.shape[1:]))
        try:
            yield
        except BaseException:
            if position_buffer:
                position_buffer.crop(past)
            raise

    def _store_captured(self, device_lengths: Tensor, rope_state: Tensor | None, keys: Tensor, values: Tensor) -> int:
        """What the device does of an `update` that the host has counted before; returns how many tokens are read as stored."""
        if self.position_buffer and self.owns_positions and rope_state is not None:
            self.position_buffer.step(rope_state, device_lengths[cuda.NUM_LENGTHS + 2 :][:1].long())
        bias, key_bias = self.store.bias, None
        if bias.depends_on_position and rope_state is not None:
            key_bias = bias.rotated(rope_state)
        self.store.write(keys, values, offsets=device_lengths[cuda.NUM_LENGTHS :], key_bias=key_bias)
        return self.store.length if self.strict else self.store.length - 1

    def evict(self) -> None:
        """Evict tokens that no query from the next token on sees; depends on the past alone, so masks may query it first."""
        if self.sliding_window is not None and self.device_lengths is None:
            self.store.evict(self.store.length - self.sliding_window + 1)

    def get_seq_length(self) -> int:
        return self.store.length

    def get_max_length(self) -> int:
        return -1

    @not_traced
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.evict()
        return self.store.length - self.store.first + query_length, self.store.first

    def reset(self) -> None:
        self.store.reset()

    def require_croppable(self, length: int) -> None:
        """Raise CacheUseError where a query after the first `length` tokens would miss some that were evicted."""
        if self.sliding_window is not None:
            self.store.require_croppable(length, max(length - self.sliding_window + 1, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; `tokens_to_remove` is negative or 0, as transformers has it."""
        tokens_to_remove = as_count(tokens_to_remove, "Minus the number of tokens to drop")
        if tokens_to_remove > 0:
            raise CacheUseError(f"crop takes minus the number of tokens to drop, not {tokens_to_remove}.")
        self.store.crop(max(self.store.length + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Let row i continue the sequence of row beam_idx[i]; sealed blocks are shared, not copied."""
        if self.store.shape is not None:
            self.store.select(as_rows(beam_idx, self.store.shape[0]))

    def offload(self) -> None:
        raise UnsupportedModelError("A packed cache is not offloaded; keep it on the model's device, or choose fewer bits.")

    prefetch = offload


def share_ropes(layers: list[PackedLayer]) -> None:
    """Let layers whose keys rotate alike share one rotary embedding, and so the tables that backends make of it."""
    shared: list[Rope] = []
    for layer in layers:
        if isinstance(rope := layer.rope, Rope):
            layer.rope = next((other for other in shared if other.rotates_like(rope)), rope)
            if layer.rope is rope:
                shared.append(rope)


@dataclass(frozen=True)
class PackedHandle:
    """The new tokens of one layer and the cache that they have joined.

    rope_state: what rotates the new tokens. precision: in which the model would at least. past: tokens stored before them.
    keys (not rotated), values: [batch, kv_heads, new, head_dim].
    """

    layer: PackedLayer
    rope_state: Tensor | None
    precision: torch.dtype | None
    past: int
    keys: Tensor
    values: Tensor

    def to(self, device: torch.device) -> "PackedHandle":
        """Itself: transformers before 5.22 sends what layers share to the device where it is read."""
        return self

    @property
    def attends_itself(self) -> bool:
        """Whether the model's own attention is right: for exact recipes, and a first chunk that attends to itself alone."""
        layer = self.layer
        return layer.device_lengths is None and (layer.is_exact or (self.past == 0 and not layer.strict))

    @not_traced
    def attend(self, module: nn.Module, query: Tensor, mask: LazyMask, scaling: float, **kwargs: Any) -> Tensor:
        """Attention for query [batch, query_heads, queries, head_dim] of the last new tokens, not rotated.

        Returns [batch, queries, query_heads, head_dim].
        """
        layer = self.layer
        if self.attends_itself:
            with undisturbed(gradients=True):
                tensors = self._exact(query)
            output, _ = model_attention(module, *tensors, mask, scaling=scaling, **kwargs)
            return output
        with undisturbed():
            inputs = self.inputs(query, mask, scaling, **kwargs)
            if layer.device_lengths is None:
                output = BACKENDS[layer.backend](inputs, layer.store)
            else:
                output = cuda.prepare(inputs, layer.store, layer.device_lengths)()
            return self.output(output, query)

    def output(self, found: Tensor, query: Tensor) -> Tensor:
        """What a backend has found, as the model takes it: [batch, queries, query_heads, head_dim] in the query's dtype."""
        return found.to(query.dtype).transpose(1, 2).contiguous()

    def mask(self, mask: LazyMask, row: int, queries: int) -> LazyMask:
        """That of this row alone, of the mask of a group's last new tokens."""
        plain = mask.attention_mask
        if not self.attends_itself and plain.rule is None:
            return mask.without_padding
        return mask.row(row, self.layer.store.first, self.past, self.keys.shape[2])

    def _exact(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values as the model's own attention takes them, rotated."""
        layer, query_positions = self.layer, None if self.rope_state is None else self.rope_state[:, -query.shape[2] :]
        rotated = layer.rotate(query, query_positions, self.precision)
        if layer.is_exact:
            return rotated, *layer.store.read()
        return rotated, layer.rotate(self.keys, self.rope_state, self.precision), self.values

    def _rotated(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """The query in its dtype, and new keys in float32 at least, unless these too are read as stored."""
        layer, precise = self.layer, torch.promote_types(query.dtype, torch.float32)
        if layer.backend == "cpu" and not layer.strict and self.keys.shape[2] == 1:  # one set of small operators, not two
            both = layer.rotate(torch.cat([query.to(precise), self.keys.to(precise)], dim=1), self.rope_state)
            return both[:, : query.shape[1]].to(query.dtype), both[:, query.shape[1] :]
        query_positions = None if self.rope_state is None else self.rope_state[:, -query.shape[2] :]
        rotated = layer.rotate(query.to(precise), query_positions).to(query.dtype)
        return rotated, None if layer.strict else layer.rotate(self.keys.to(precise), self.rope_state)

    def inputs(self, query: Tensor, mask: LazyMask, scaling: float, **kwargs: Any) -> AttentionInputs:
        """What the cache's backend is given: the query rotated, new tokens unless they too are read as stored."""
        layer = self.layer
        past, buffer = layer.store.length if layer.strict else self.past, layer.position_buffer
        rotated, new_keys = self._rotated(query)
        rope, rope_state = layer.rope if layer.rotates_on_read else None, None
        if rope and buffer:
            captured = layer.device_lengths is not None
            rope_state = buffer.buffer if captured else buffer.read(layer.store.first, past)
        return AttentionInputs(
            query=rotated,
            past=past,
            new=None if new_keys is None else (new_keys, self.values),
            rope=rope,
            rope_state=rope_state,
            mask=mask.attention_mask,
            scaling=scaling,
            softcap=kwargs.get("softcap"),
            sink_logits=kwargs.get("s_aux"),
        )
