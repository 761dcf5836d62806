"""Queries on their way along the keys: a softmax that is carried from one piece of keys to the next, in two forms."""

from collections.abc import Callable

import torch
from torch import Tensor

from narrowkv.attention import fused
from narrowkv.attention.visible import Visible


class Running:
    """The largest score so far, the sum of weights and the weighted sum of values, in the dtype of the queries."""

    def __init__(
        self,
        query: Tensor,
        asking: range,
        visible: Visible,
        scaling: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ):
        """query: [batch, query_heads, queries, head_dim] float32 or float64. asking: where in the sequence they are. The rest
        as of `naive.attend`.
        """
        self.query = query * scaling
        self.asking = asking
        self.visible = visible
        self.softcap = softcap
        self.largest = query.new_full((*query.shape[:3], 1), -torch.inf)
        self.total = torch.zeros_like(self.largest)
        self.mixed = torch.zeros_like(query)
        if sink_logits is not None:
            self.largest = sink_logits.to(query.dtype)[None, :, None, None].expand_as(self.largest)
            self.total = torch.ones_like(self.largest)

    def see(self, keys: Tensor, values: Tensor, tokens: range) -> None:
        """Add keys (rotated) and values [batch, kv_heads, n, head_dim] of these tokens of the sequence."""
        batch, heads, _, dim = keys.shape
        grouped = self.query.reshape(batch, heads, -1, dim)  # [batch, kv_heads, group * queries, head_dim]
        scores = (grouped @ keys.transpose(2, 3)).view(batch, -1, len(self.asking), len(tokens))
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.visible.pattern(self.asking, tokens) != "all":
            scores = scores.masked_fill_(_hidden(self.visible, self.asking, tokens, keys.device), -torch.inf)
        largest = torch.maximum(self.largest, scores.amax(-1, keepdim=True))
        reference = largest.masked_fill(largest.isinf(), 0.0)  # of a query that has seen nothing yet
        weights = scores.sub_(reference).exp_()
        fading = (self.largest - reference).exp_()
        self.total = self.total * fading + weights.sum(-1, keepdim=True)
        mixed = weights.view(batch, heads, -1, len(tokens)) @ values
        self.mixed = self.mixed * fading + mixed.view_as(self.mixed)
        self.largest = largest

    def result(self) -> Tensor:
        """[batch, query_heads, queries, head_dim]; zeros for a query that has seen nothing."""
        return self.mixed / self.total.masked_fill(self.total == 0, 1.0)


class Fused:
    """Torch's fused attention over each piece (fused.py), and the mean of those, weighted by the sums of their softmaxes.

    Products are in the dtype of the queries, so that 16 bits use the matrix unit of a processor or a GPU; weights and means
    are in float32 at least.
    """

    def __init__(
        self,
        query: Tensor,
        asking: range,
        visible: Visible,
        scaling: float,
        sink_logits: Tensor | None,
        joining: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    ):
        """query: [batch, query_heads, queries, head_dim]. asking: where in the sequence they are. joining: `join`, or what
        does the same. The rest as of `naive.attend`.
        """
        self.query = query
        self.asking = asking
        self.visible = visible
        self.scaling = scaling
        self.joining = joining
        precision = torch.promote_types(query.dtype, torch.float32)
        self.mean = torch.zeros(query.shape, dtype=precision, device=query.device)
        self.log_total = self.mean.new_full(query.shape[:3], -torch.inf)
        if sink_logits is not None:
            self.log_total[:] = sink_logits.to(precision)[:, None]

    def see(self, keys: Tensor, values: Tensor, tokens: range) -> None:
        """Add keys (rotated) and values [batch, kv_heads, n, head_dim] of these tokens, the channels of each side by side."""
        pattern = self.visible.pattern(self.asking, tokens)
        causal = pattern == "causal" and len(tokens) == len(self.asking)
        hidden = None if pattern == "all" or causal else _hidden(self.visible, self.asking, tokens, keys.device)
        mean, log_total = fused.attend(self.query, keys, values, causal, hidden, self.scaling)
        self.joining(self.mean, self.log_total, mean, log_total)

    def result(self) -> Tensor:
        """[batch, query_heads, queries, head_dim]; zeros for a query that has seen nothing."""
        return self.mean


def join(mean: Tensor, log_total: Tensor, more: Tensor, log_more: Tensor) -> None:
    """Add what queries found in one more piece to what they found before, in place.

    mean, more: [batch, heads, queries, head_dim], more in any dtype. log_total, log_more: [batch, heads, queries], logs of the
    sums of softmaxes, -inf where a query saw nothing.
    """
    share = (log_more - log_total).sigmoid().nan_to_num(0.0)  # nan where both have seen nothing
    mean.lerp_(more.to(mean.dtype), share[..., None])
    torch.logaddexp(log_total, log_more, out=log_total)


def _hidden(visible: Visible, asking: range, tokens: range, device: torch.device) -> Tensor:
    """What the queries do not see of the tokens: [batch or 1, 1, queries, tokens] bool."""
    queries, keys = (torch.arange(some.start, some.stop, device=device, dtype=torch.int64) for some in (asking, tokens))
    return visible.hidden(queries, keys)
