"""Queries on their way along the keys: a softmax that is carried from one split of keys to the next, in two forms."""

from collections.abc import Callable

import torch
from torch import Tensor

from narrowkv.attention import sdpa
from narrowkv.attention.inputs import AttentionInputs
from narrowkv.attention.mask import AttentionMask


class OnlineSoftmax:
    """The largest score so far, the sum of weights and the weighted sum of values, in the dtype of the queries."""

    def __init__(self, inputs: AttentionInputs, some: slice):
        """Of some of the queries, which are in float32 or float64."""
        self.query = inputs.query[:, :, some] * inputs.scaling
        self.query_positions = inputs.query_positions[some]
        self.mask, self.softcap, sink_logits = inputs.mask, inputs.softcap, inputs.sink_logits
        self.running_max = self.query.new_full((*self.query.shape[:3], 1), -torch.inf)
        self.denominator = torch.zeros_like(self.running_max)
        self.accumulator = torch.zeros_like(self.query)
        if sink_logits is not None:
            self.running_max = sink_logits.to(self.query.dtype)[None, :, None, None].expand_as(self.running_max)
            self.denominator = torch.ones_like(self.running_max)

    def update(self, keys: Tensor, values: Tensor, tokens: range) -> None:
        """Add keys (rotated) and values [batch, kv_heads, n, head_dim] of these tokens of the sequence."""
        batch, heads, _, dim = keys.shape
        grouped = self.query.reshape(batch, heads, -1, dim)  # [batch, kv_heads, group * queries, head_dim]
        scores = (grouped @ keys.transpose(2, 3)).view(batch, -1, len(self.query_positions), len(tokens))
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.mask.pattern(self.query_positions, tokens) != "all":
            scores = scores.masked_fill_(_hidden(self.mask, self.query_positions, tokens, keys.device), -torch.inf)
        running_max = torch.maximum(self.running_max, scores.amax(-1, keepdim=True))
        reference = running_max.masked_fill(running_max.isinf(), 0.0)  # of a query that has seen nothing yet
        weights = scores.sub_(reference).exp_()
        rescale = (self.running_max - reference).exp_()
        self.denominator = self.denominator * rescale + weights.sum(-1, keepdim=True)
        accumulator = weights.view(batch, heads, -1, len(tokens)) @ values
        self.accumulator = self.accumulator * rescale + accumulator.view_as(self.accumulator)
        self.running_max = running_max

    def result(self) -> Tensor:
        """[batch, query_heads, queries, head_dim]; zeros for a query that has seen nothing."""
        return self.accumulator / self.denominator.masked_fill(self.denominator == 0, 1.0)


class SdpaAccumulator:
    """Torch's fused attention over each split (sdpa.py), and the mean of those, weighted by the sums of their softmaxes.

    Products are in the dtype of the queries, so that 16 bits use the matrix unit of a processor or a GPU; weights and means
    are in float32 at least.
    """

    def __init__(self, inputs: AttentionInputs, some: slice, merge: Callable[[Tensor, Tensor, Tensor, Tensor], None]):
        """Of some of the queries. merge: `merge_states`, or what does the same."""
        self.query = query = inputs.query[:, :, some]
        self.query_positions = inputs.query_positions[some]
        self.mask, self.scaling, self.merge = inputs.mask, inputs.scaling, merge
        precision, sink_logits = inputs.precision, inputs.sink_logits
        self.mean = torch.zeros(query.shape, dtype=precision, device=query.device)
        self.lse = self.mean.new_full(query.shape[:3], -torch.inf)
        if sink_logits is not None:
            self.lse[:] = sink_logits.to(precision)[:, None]

    def update(self, keys: Tensor, values: Tensor, tokens: range) -> None:
        """Add keys (rotated) and values [batch, kv_heads, n, head_dim] of these tokens, the channels of each side by side."""
        pattern = self.mask.pattern(self.query_positions, tokens)
        causal = pattern == "causal" and len(tokens) == len(self.query_positions)
        hidden = None if pattern == "all" or causal else _hidden(self.mask, self.query_positions, tokens, keys.device)
        mean, lse = sdpa.attend(self.query, keys, values, causal, hidden, self.scaling)
        self.merge(self.mean, self.lse, mean, lse)

    def result(self) -> Tensor:
        """[batch, query_heads, queries, head_dim]; zeros for a query that has seen nothing."""
        return self.mean


def merge_states(mean: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add what queries found in one more split to what they found before, in place.

    mean, more: [batch, heads, queries, head_dim], more in any dtype. lse, more_lse: [batch, heads, queries], logs of the
    sums of softmaxes, -inf where a query saw nothing.
    """
    share = (more_lse - lse).sigmoid().nan_to_num(0.0)  # nan where both have seen nothing
    mean.lerp_(more.to(mean.dtype), share[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


def _hidden(mask: AttentionMask, query_positions: range, tokens: range, device: torch.device) -> Tensor:
    """What the queries do not see of the tokens: [batch or 1, 1, queries, tokens] bool."""
    queries, keys = (
        torch.arange(some.start, some.stop, device=device, dtype=torch.int64) for some in (query_positions, tokens)
    )
    return mask.hidden(queries, keys)
