"""CacheGroup: sequences of different lengths, each with a cache of its own, as rows of one forward pass."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from narrowkv.attention import AttentionInputs, attend_each
from narrowkv.codec.surroundings import undisturbed
from narrowkv.errors import CacheUseError, UnsupportedModelError
from narrowkv.integrations.cache import PackedCache, require_packed
from narrowkv.integrations.hooks import ANOTHER_MODEL, LayerInputs, LazyMask, NarrowCache, require_inputs
from narrowkv.integrations.layer import PackedHandle, PackedLayer, not_traced
from narrowkv.integrations.versions import keeps_nothing

NO_ROWS = "A CacheGroup has a row for each cache; give it at least one."
TWICE = "A cache is one row of a CacheGroup, not several; copy it first: copy.deepcopy(cache)."
NO_DENSE = "Backend dense hands tensors to models, whose rows would be of one length; run these caches one by one."
NO_BATCH = "A row of a CacheGroup is one sequence, and a cache has {}; make a cache for each sequence."
NO_PADDING = "Rows of a CacheGroup have no padding; pass no attention mask, and as many new tokens of each row."
NO_BEAMS = "Rows of a CacheGroup are independent, so they are neither beams nor repeated; give a cache to generate instead."
BY_CACHE = "Each row of a CacheGroup is a cache of its own; call this on the caches, one by one."
MIXED = "Layers without attention have a state for some rows of this CacheGroup only; let each cache read its prompt first."
NO_POSITIONS = (
    "This model was not given positions that differ from row to row, though lengths do; pass "
    "position_ids=group.positions(new_tokens)."
)
ONE_LENGTH = (
    "This model's rotary embedding follows the longest row (dynamic, longrope), and {} tokens are beyond where that changes; "
    "run these caches one by one."
)
READS_LENGTH = (
    "This model's attention scales queries by one length for all rows (temperature tuning), so rows of different lengths "
    "cannot run together; run them one by one."
)


class CacheGroup(NarrowCache):
    """Caches of one sequence each, of any lengths, as rows of one forward pass: continuous batching.

    caches: PackedCaches of one model, one for each row. Row i of `model(ids, past_key_values=group)` continues cache i by as
    many new tokens as the other rows, in the caches themselves, so sequences join and leave between two passes: make another
    group of those that run. Each row is attended to bit for bit as if it were alone; the model's own products may be rounded
    otherwise for several rows. Raises CacheUseError where the caches do not go together.
    """

    def __init__(self, caches: Sequence[PackedCache]):
        self.caches = list(caches)
        self._require_fit()
        self.running: list[PackedCache] = []
        first = self.caches[0]
        super().__init__(layers=[self._layer(i) for i in range(len(first.layers))])

    def _require_fit(self) -> None:
        if not self.caches:
            raise CacheUseError(NO_ROWS)
        for cache in self.caches:
            require_packed(cache)
            if cache.batch_size > 1:
                raise CacheUseError(NO_BATCH.format(cache.batch_size))
            if cache.dense:
                raise UnsupportedModelError(NO_DENSE)
        if len({id(cache) for cache in self.caches}) < len(self.caches):
            raise CacheUseError(TWICE)
        if any(cache.decoder() is not self.caches[0].decoder() for cache in self.caches):
            raise CacheUseError(ANOTHER_MODEL)

    def _layer(self, i: int) -> Any:
        rows = [cache.layers[i] for cache in self.caches]
        if all(isinstance(row, PackedLayer) for row in rows):
            return GroupLayer([row for row in rows if isinstance(row, PackedLayer)])
        return rows[0] if keeps_nothing(rows[0]) else merged(rows)

    def _states(self) -> list[int]:
        """Layers without attention that keep a state, which is that of all rows."""
        return [i for i, layer in enumerate(self.layers) if not isinstance(layer, GroupLayer) and not keeps_nothing(layer)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [cache.length for cache in self.caches]

    def positions(self, new_tokens: int = 1) -> Tensor:
        """Positions of the next tokens of each row, [rows, new_tokens] int64."""
        device = self.caches[0].device
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        return lengths[:, None] + torch.arange(new_tokens, dtype=torch.int64, device=device)

    def own_positions(self, new_tokens: int) -> Tensor | None:
        return self.positions(new_tokens)

    def begin(self, module: Any, inputs: LayerInputs) -> None:
        layer = int(module.layer_idx)
        if layer not in self.caches[0].modules:  # a reader of another layer's keys
            return
        if self.caches[0].modules[layer]() is not module:
            raise CacheUseError(ANOTHER_MODEL)
        super().begin(module, inputs)

    @not_traced
    def start(self, decoder: nn.Module, tokens: Tensor | None, mask: Any, positions: Any) -> None:
        """Called before the language model runs; raises like PackedCache, and where rows would be mixed up."""
        if isinstance(mask, Tensor) and not mask.all():
            raise CacheUseError(NO_PADDING)
        if tokens is not None and len(tokens) != len(self.caches):
            raise CacheUseError(f"This CacheGroup has {len(self.caches)} rows, but got batch {len(tokens)}.")
        self._require_positions(positions)
        if tokens is not None:
            _require_one_rotation(decoder.config, [length + tokens.shape[1] for length in self.lengths])
        for i, cache in enumerate(self.caches):
            row = positions[i : i + 1] if isinstance(positions, Tensor) and positions.dim() == 2 else None
            try:
                cache.start(decoder, None if tokens is None else tokens[i : i + 1], None, row)
            except BaseException:
                self.finish(failed=True)
                raise
            self.running.append(cache)
        for i in self._states():  # caches may have read something since the group was made
            self.layers[i] = merged([cache.layers[i] for cache in self.caches])

    def _require_positions(self, positions: Any) -> None:
        """Raise CacheUseError for one row of positions, or equal ones, of rows of different lengths."""
        if isinstance(positions, Tensor) and len(set(self.lengths)) > 1:
            rows = positions.unbind(-2)
            if all(torch.equal(row, rows[0]) for row in rows):
                raise CacheUseError(NO_POSITIONS)

    @not_traced
    def finish(self, failed: bool) -> None:
        """Called when the language model has run to its end, or has failed."""
        if self.running and not failed:
            for i in self._states():
                split(self.layers[i], [cache.layers[i] for cache in self.caches])
        while self.running:
            self.running.pop().finish(failed)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Refused: raises CacheUseError."""
        raise CacheUseError(NO_BEAMS)

    def batch_select_indices(self, indices: Any) -> None:
        """Refused: raises CacheUseError."""
        raise CacheUseError(NO_BEAMS)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: raises CacheUseError."""
        raise CacheUseError(NO_BEAMS)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: raises CacheUseError."""
        raise CacheUseError(BY_CACHE)

    def reset(self) -> None:
        """Refused: raises CacheUseError."""
        raise CacheUseError(BY_CACHE)

    def __repr__(self) -> str:
        return f"CacheGroup({len(self.caches)} rows of {', '.join(map(str, self.lengths))} tokens)"


class GroupLayer(CacheLayerMixin):
    """One layer of a CacheGroup. rows: that layer of each cache."""

    def __init__(self, rows: list[PackedLayer]):
        super().__init__()
        self.rows = rows
        self.is_sliding = rows[0].is_sliding
        self.inputs: LayerInputs | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    @not_traced
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens of each row; key_states and value_states: [rows, kv_heads, new, head_dim], keys not rotated."""
        inputs, self.inputs = require_inputs(self.inputs), None
        handles = []
        for i, row in enumerate(self.rows):
            row.inputs = inputs.row(i)
            handles.append(row.update(key_states[i : i + 1], value_states[i : i + 1])[0])
        handle = GroupHandle(handles)
        return handle, handle

    def get_seq_length(self) -> int:
        """That of the longest row; attention must not depend on it where rows differ."""
        lengths = [row.get_seq_length() for row in self.rows]
        if self.inputs is not None and len(set(lengths)) > 1:  # requested by the attention module, which has begun
            raise UnsupportedModelError(READS_LENGTH)
        return max(lengths)

    def get_max_length(self) -> int:
        return -1

    @not_traced
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max((row.get_mask_sizes(query_length) for row in self.rows), key=lambda sizes: sum(sizes))

    def offload(self) -> None:
        self.rows[0].offload()

    prefetch = offload


@dataclass(frozen=True)
class GroupHandle:
    """The new tokens of one layer, and the caches that they have joined, row by row."""

    rows: list[PackedHandle]

    def to(self, device: torch.device) -> "GroupHandle":
        """Itself, like PackedHandle."""
        return self

    @not_traced
    def attend(self, module: nn.Module, query: Tensor, mask: LazyMask, scaling: float, **kwargs: Any) -> Tensor:
        """Attention of all rows, in one call of the backend; query and result like those of PackedHandle."""
        found: dict[int, Tensor] = {}
        parts: dict[int, AttentionInputs] = {}
        for i, handle in enumerate(self.rows):
            own = query[i : i + 1]
            row_mask = handle.mask(mask, i, own.shape[2])
            if handle.attends_itself:
                found[i] = handle.attend(module, own, row_mask, scaling, **kwargs)
            else:
                with undisturbed():
                    parts[i] = handle.inputs(own, row_mask, scaling, **kwargs)
        with undisturbed():
            layers = [self.rows[i].layer for i in parts]
            stores = [(inputs, layer.store) for inputs, layer in zip(parts.values(), layers, strict=True)]
            outputs = attend_each(layers[0].backend, stores) if stores else []
            found.update((i, self.rows[i].output(output, query)) for i, output in zip(parts, outputs, strict=True))
        return torch.cat([found[i] for i in range(len(self.rows))])


def _require_one_rotation(config: Any, lengths: list[int]) -> None:
    """Raise UnsupportedModelError where the angles of some rows would be those of a longer row's length."""
    given = getattr(config, "rope_parameters", None) or {}
    for rope in [part for part in given.values() if isinstance(part, dict)] or [given]:
        kind, limit = rope.get("rope_type"), getattr(config, "max_position_embeddings", 0)
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", limit)
        longest, shortest = max(lengths), min(lengths)
        mixed = shortest <= limit if kind == "longrope" else shortest < longest
        if kind in ("dynamic", "longrope") and longest > limit and mixed:
            raise UnsupportedModelError(ONE_LENGTH.format(longest))


def merged(rows: list[Any]) -> Any:
    """A layer without attention whose state is that of all rows; raises CacheUseError where some have none."""
    layer = copy.copy(rows[0])
    for name in vars(layer):
        vars(layer)[name] = _over(torch.cat, [vars(row)[name] for row in rows])
    return layer


def split(layer: Any, rows: list[Any]) -> None:
    """Give each row its part of the state of a layer that was `merged`."""
    for name, part in vars(layer).items():
        for i, row in enumerate(rows):
            vars(row)[name] = _over(lambda parts, i=i: parts[0][i : i + 1].clone(), [part])  # type: ignore[misc]


def _over(operation: Callable[[list[Tensor]], Tensor], parts: list[Any]) -> Any:
    """The operation on tensors, or on those of the same names in dictionaries; all else is that of the first."""
    if isinstance(parts[0], dict):
        return {name: _over(operation, [part[name] for part in parts]) for name in parts[0]}
    if len({isinstance(part, Tensor) for part in parts}) > 1:
        raise CacheUseError(MIXED)
    return operation(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]
