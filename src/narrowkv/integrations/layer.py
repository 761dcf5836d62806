"""PackedLayer: one layer of a packed cache, and the handle that it gives to attention in place of tensors."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from narrowkv.attention import BACKENDS, AnyRope, Rope, cuda
from narrowkv.codec.surroundings import undisturbed
from narrowkv.errors import CacheUseError, UnsupportedModelError
from narrowkv.integrations.hold import not_traced
from narrowkv.integrations.interface import LazyMask, Step, model_attention, require_step
from narrowkv.store import LayerStore, Ledger
from narrowkv.store.checks import as_count, as_rows


class PackedLayer(CacheLayerMixin):
    """One layer of a PackedCache.

    rope: turns its keys, None where they are not turned. ledger: what `rope` needs of each stored token, None where neither
    keys nor a bias are turned when they are read. sliding_window: how many of the newest tokens a query of this layer sees,
    itself included, None for all; older ones are forgotten.
    """

    def __init__(
        self,
        store: LayerStore,
        rope: AnyRope | None,
        ledger: Ledger | None,
        backend: str,
        strict: bool,
        sliding_window: int | None,
    ):
        super().__init__()
        self.store = store
        self.rope = rope
        self.ledger = ledger
        self.backend = backend
        self.strict = strict
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        # whether numbers are stored as the model's own attention wants them: not quantised, and keys turned
        exact = all(quantizer.scheme.datatype == "exact" for quantizer in store.quantizers)
        self.is_exact = exact and not self.turns_when_read
        # whether `crop` leaves no trace: tokens that have left an exact window cannot become exact again
        self.is_croppable = store.window == 0 and store.together == 1
        self.step: Step | None = None
        self.told: Tensor | None = None  # while a CUDA graph is captured: [cuda.TOLD + 4] int32, what its kernels are told
        self.leads = False  # whether, then, it is the first of those that share a ledger

    @property
    def turns_when_read(self) -> bool:
        """Whether keys are stored before the rotary embedding."""
        return self.rope is not None and self.store.quantizers[0].scheme.pre_rope

    def turn(self, x: Tensor, kept: Tensor | None, precision: torch.dtype | None = None) -> Tensor:
        """Turn x: [batch, heads, new, head_dim] as the model's layer does, in no fewer bits than `precision` and x have."""
        return x if self.rope is None or kept is None else self.rope.rotate(x, kept, precision)

    def turn_by(self, inverse_frequencies: Tensor) -> None:
        """Turn keys by other frequencies than so far; only while nothing is stored."""
        assert isinstance(self.rope, Rope)
        if not torch.equal(inverse_frequencies, self.rope.inverse_frequencies):
            self.rope = replace(self.rope, inverse_frequencies=inverse_frequencies)
            self.store.bias.rope = self.rope if self.store.bias.rope else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    @not_traced
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens; key_states and value_states: [batch, kv_heads, new, head_dim], keys not turned."""
        step, self.step = require_step(self.step), None
        self.lazy_initialization(key_states, value_states)
        self.forget()
        with undisturbed(gradients=self.is_exact):
            kept = self.rope.keep(step.positions, step.tables) if self.rope else None
            stored = key_states if self.turns_when_read else self.turn(key_states, kept, step.precision)
            if self.told is None:
                past = self._store(step, kept, stored, value_states)
            else:
                past = self._store_captured(self.told, kept, stored, value_states)
        handle = PackedHandle(self, kept, step.precision, past, key_states, value_states)
        return handle, handle

    def _store(self, step: Step, kept: Tensor | None, keys: Tensor, values: Tensor) -> int:
        """Store new tokens; returns how many were held before."""
        past, new = self.store.length, keys.shape[2]
        valid = step.valid(past, new)
        self.store.fitting(keys, values)
        with self._noted(past, kept, len(keys)):
            self.store.append(keys, values, valid)
        return past

    @contextlib.contextmanager
    def _noted(self, past: int, kept: Tensor | None, batch: int) -> Iterator[None]:
        """Within, the ledger knows new tokens, which follow `past` others; it forgets them again where they are refused."""
        ledger = self.ledger if self.ledger and self.ledger.length == past else None
        if ledger and kept is not None:
            ledger.append(kept.expand(batch, *kept.shape[1:]))
        try:
            yield
        except BaseException:
            if ledger:
                ledger.crop(past)
            raise

    def _store_captured(self, told: Tensor, kept: Tensor | None, keys: Tensor, values: Tensor) -> int:
        """What the device does of an `update` that the host has counted before; returns how many tokens are read as stored."""
        if self.ledger and self.leads and kept is not None:
            self.ledger.step(kept, told[cuda.TOLD + 2 :][:1].long())
        bias, of_keys = self.store.bias, None
        if bias.turns and kept is not None:
            of_keys = bias.turned(kept)
        self.store.write(keys, values, places=told[cuda.TOLD :], of_keys=of_keys)
        return self.store.length if self.strict else self.store.length - 1

    def forget(self) -> None:
        """Drop what no query from the next token on can see; what follows from the past alone, so that masks may ask first."""
        if self.sliding_window is not None and self.told is None:
            self.store.forget(self.store.length - self.sliding_window + 1)

    def get_seq_length(self) -> int:
        return self.store.length

    def get_max_length(self) -> int:
        return -1

    @not_traced
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.forget()
        return self.store.length - self.store.first + query_length, self.store.first

    def reset(self) -> None:
        self.store.reset()

    def require_croppable(self, length: int) -> None:
        """Raise CacheUseError where a query after the first `length` tokens would miss some that were forgotten."""
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


@dataclass(frozen=True)
class PackedHandle:
    """The new tokens of one layer and the cache that they have joined.

    kept: what turns the new tokens. precision: in which the model would at least. past: tokens stored before them. keys (not
    turned), values: [batch, kv_heads, new, head_dim].
    """

    layer: PackedLayer
    kept: Tensor | None
    precision: torch.dtype | None
    past: int
    keys: Tensor
    values: Tensor

    def to(self, device: torch.device) -> "PackedHandle":
        """Itself: transformers before 5.22 sends what layers share to the device where it is read."""
        return self

    @not_traced
    def attend(self, module: nn.Module, query: Tensor, mask: LazyMask, scaling: float, **kwargs: Any) -> Tensor:
        """Attention for query [batch, query_heads, queries, head_dim] of the last new tokens, not turned.

        Returns [batch, queries, query_heads, head_dim].

        Exact recipes, and a first chunk that attends to itself alone, use the model's own attention; everything else the
        cache's backend.
        """
        layer = self.layer
        if layer.told is None and (layer.is_exact or (self.past == 0 and not layer.strict)):
            with undisturbed(gradients=True):
                tensors = self._exact(query)
            output, _ = model_attention(module, *tensors, mask, scaling=scaling, **kwargs)
            return output
        with undisturbed():
            return (self._attend if layer.told is None else self._attend_captured)(query, mask, scaling, **kwargs)

    def _exact(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values as the model's own attention takes them, turned."""
        layer, asking = self.layer, None if self.kept is None else self.kept[:, -query.shape[2] :]
        turned = layer.turn(query, asking, self.precision)
        if layer.is_exact:
            return turned, *layer.store.read()
        return turned, layer.turn(self.keys, self.kept, self.precision), self.values

    def _attend(self, query: Tensor, mask: LazyMask, scaling: float, **kwargs: Any) -> Tensor:
        """Attention by the cache's backend."""
        layer = self.layer
        past = layer.store.length if layer.strict else self.past
        kept = layer.ledger.read(layer.store.first, past) if layer.ledger and layer.turns_when_read else None
        question, options = self._question(query, mask, scaling, past, kept, **kwargs)
        return BACKENDS[layer.backend](question, layer.store, **options).to(query.dtype).transpose(1, 2).contiguous()

    def _attend_captured(self, query: Tensor, mask: LazyMask, scaling: float, **kwargs: Any) -> Tensor:
        """The same, while a CUDA graph is captured."""
        layer = self.layer
        kept = layer.ledger.room if layer.ledger and layer.turns_when_read else None
        question, options = self._question(query, mask, scaling, self.past, kept, **kwargs)
        output = cuda.prepare(question, layer.store, told=layer.told, **options)()
        return output.to(query.dtype).transpose(1, 2).contiguous()

    def _question(
        self, query: Tensor, mask: LazyMask, scaling: float, past: int, kept: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """The query turned, and what backends are told beside it and the store."""
        layer, precise = self.layer, torch.promote_types(query.dtype, torch.float32)
        asking = None if self.kept is None else self.kept[:, -query.shape[2] :]
        return layer.turn(query.to(precise), asking).to(query.dtype), {
            "past": past,
            "new": None if layer.strict else (layer.turn(self.keys.to(precise), self.kept), self.values),
            "rope": layer.rope if layer.turns_when_read else None,
            "kept": kept,
            "visible": mask.visible,
            "scaling": scaling,
            "softcap": kwargs.get("softcap"),
            "sink_logits": kwargs.get("s_aux"),
        }
