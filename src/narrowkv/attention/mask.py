"""Which stored tokens a query may see."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# (row of the batch, head, index of the query, index of the key), which broadcast, to True where the query sees the key
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionMask:
    """A query sees the tokens up to itself, except padding and what a sliding window has left behind; or as a rule has it.

    padding: [batch, tokens of the whole sequence] bool, False where a token is hidden from all; None where none is.
    sliding_window: a query sees only that many of the newest tokens, itself included. rule: replaces both causality
    and window (chunked attention, images that see themselves whole). batch: rows that a rule tells apart.
    """

    padding: Tensor | None = None
    sliding_window: int | None = None
    rule: Rule | None = None
    batch: int = 1

    def hidden(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries [n], keys [m]: indices in the sequence, ascending by one. Returns [batch or 1, 1, n, m] bool."""
        query, key = queries[None, None, :, None], keys[None, None, None, :]
        if self.rule is not None:
            rows = torch.arange(self.batch, device=keys.device, dtype=torch.int64)
            hidden = ~self.rule(rows[:, None, None, None], keys.new_zeros(1, 1, 1, 1), query, key)
        else:
            hidden = key > query
            if self.sliding_window is not None:
                hidden = hidden | (key <= query - self.sliding_window)
        if self.padding is not None:
            hidden = hidden | ~self.padding[:, None, None, int(keys[0]) : int(keys[0]) + len(keys)]
        return hidden

    def within(self, keys: range, queries: range) -> range:
        """Those of the keys which some query may see, as far as that is plain without looking."""
        if self.rule is not None:
            return keys
        oldest = 0 if self.sliding_window is None else queries.start - self.sliding_window + 1
        return range(max(keys.start, oldest), min(keys.stop, queries.stop))

    def pattern(self, queries: range, keys: range) -> Literal["all", "causal"] | None:
        """What the queries see of the keys, if it is plain: all of them, or from the first on those up to themselves.

        keys: without those that `within` leaves out.
        """
        if self.rule is not None or (self.sliding_window is not None and keys.start <= queries[-1] - self.sliding_window):
            return None
        if self.padding is not None and not self.padding[:, keys.start : keys.stop].all():
            return None
        if keys[-1] <= queries.start:
            return "all"
        return "causal" if keys.start == queries.start else None
