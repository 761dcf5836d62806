"""What attention is computed from besides the stored tokens, and what every backend derives from it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from narrowkv.attention.mask import AttentionMask
from narrowkv.attention.rope import AnyRope


class Stored(Protocol):
    """Stored tokens as they are read everywhere: a `LayerStore`, or a `PagedSequence`. first: the first that is stored."""

    @property
    def first(self) -> int: ...
    def read(self, stop: int) -> tuple[Tensor, Tensor]: ...
    def tiles(self, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]: ...


@dataclass(frozen=True)
class AttentionInputs:
    """The newest queries of a layer, the tokens that they see, and how scores are computed.

    query: [batch, query_heads, queries, head_dim], already rotated; the last query is the last token of the sequence.
    past: tokens before this one are read from the packed form. new: exact keys (rotated) and values that follow them,
    [batch, kv_heads, n, head_dim] each, or None. rope: rotates the stored keys, None where they were stored rotated;
    rope_state: what it needs of each stored token, [batch, past - store.first, ...]. mask: which tokens a query sees.
    scaling: factor on the scores. softcap: scores s become softcap * tanh(s / softcap). sink_logits: [query_heads], a score of
    each head that takes part in the softmax and has no value (GPT-OSS).
    """

    query: Tensor
    past: int
    new: tuple[Tensor, Tensor] | None
    rope: AnyRope | None
    rope_state: Tensor | None
    mask: AttentionMask
    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def queries(self) -> int:
        """How many queries each head has."""
        return self.query.shape[2]

    @property
    def length(self) -> int:
        """Tokens of the sequence, new ones included."""
        return self.past + (self.new[0].shape[2] if self.new else 0)

    @property
    def query_positions(self) -> range:
        """Where in the sequence the queries are."""
        return range(self.length - self.queries, self.length)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of exact computation: float32, or float64 for queries in float64."""
        return torch.promote_types(self.query.dtype, torch.float32)

    def with_query(self, query: Tensor) -> "AttentionInputs":
        """The same, of other queries or of the same in another dtype."""
        return replace(self, query=query)

    def rotate(self, keys: Tensor, start: int) -> Tensor:
        """Stored keys [batch, kv_heads, n, head_dim], the first of which is the `start`-th stored, rotated in `precision`; as
        they are where nothing is to be rotated.
        """
        if self.rope is None or self.rope_state is None:
            return keys
        return self.rope.rotate(keys.to(self.precision), self.rope_state[:, start : start + keys.shape[2]])

    def rope_state_at(self, tokens: Tensor) -> Tensor:
        """What `rope` needs of these stored tokens, [batch, n] from the first stored on: [batch, n, ...]."""
        assert self.rope_state is not None
        rows = torch.arange(len(tokens), dtype=torch.int64, device=tokens.device)[:, None]
        return self.rope_state.expand(len(tokens), *self.rope_state.shape[1:])[rows, tokens]

    def hidden(self, first: int) -> Tensor:
        """Which of the tokens from `first` on each query does not see, [batch or 1, 1, queries, tokens] bool."""
        index = torch.arange(first, self.length, dtype=torch.int64, device=self.query.device)
        return self.mask.hidden(index[len(index) - self.queries :], index)
