"""IntrinsicValueQuantizer: the intrinsic-value codec (`codec.intrinsic`) for a cache, with four levels for each KV head of a
block.

The levels of a block are those of a sliding window of blocks: itself and the next `lookahead_blocks - 1` of its scheme, which
are exact still when it is encoded, so that levels depend on the elements alone, not on how they arrive or on what earlier ones
became.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.codec.datatypes import boundaries
from narrowkv.codec.intrinsic import BINS
from narrowkv.codec.quantized import QuantizedTensor
from narrowkv.codec.quantizers.base import BaseQuantizer
from narrowkv.codec.ranges import to_16_bits
from narrowkv.codec.saturation import Saturation
from narrowkv.codec.scheme import Scheme


@dataclass(frozen=True)
class IntrinsicValueQuantizer(BaseQuantizer):
    """One tensor's scheme; there are no tables, since the levels of each block are found when it is encoded."""

    scheme: Scheme

    def encode(self, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None) -> QuantizedTensor:
        """Quantize the elements of whole blocks, once and for all; parameters like those of `Quantizer.encode`, but that the
        last `scheme.lookahead_tokens` tokens have a part in the levels of those before and no codes.

        Tokens that are skipped have no part in the levels. Raises ActivationError where a level does not fit 16 bits.
        """
        elements, coded = x.float(), x.shape[2] - self.scheme.lookahead_tokens
        left_out = torch.zeros_like(elements, dtype=torch.bool)
        if skip is not None:
            left_out |= skip[:, None, :, None]
        found = intrinsic_levels(self._windows(elements), self._windows(left_out), self.scheme.datatype == "iv-kmeans")
        levels = to_16_bits(found, torch.float16, "Levels")
        elements, by_token = elements[:, :, :coded], self._by_token(levels)
        if self.scheme.quantization.round_down:
            _, v1, v2, v_max = by_token.split(1, dim=-1)  # [batch, kv_heads, tokens, 1] each
            above = [elements >= v1, elements >= v2, elements > v_max]
        else:
            above = [elements > border for border in boundaries(by_token).split(1, dim=-1)]
        return QuantizedTensor(torch.stack(above).sum(0, dtype=torch.uint8), {"levels": levels})

    def dequantize(self, encoded: QuantizedTensor) -> Tensor:
        """What the codes stand for: [batch, kv_heads, tokens, head_dim] float32."""
        return self._by_token(encoded.ranges["levels"]).gather(3, encoded.codes.long())

    def _windows(self, x: Tensor) -> Tensor:
        """[batch, kv_heads, tokens, head_dim] -> [batch, kv_heads, blocks, elements of a window that begins with the
        block].
        """
        block = self.scheme.tokens_per_group
        return x.unfold(2, block + self.scheme.lookahead_tokens, block).flatten(3)

    def _by_token(self, levels: Tensor) -> Tensor:
        """The levels of each token: [batch, kv_heads, blocks, 4] -> [batch, kv_heads, tokens, 4] float32."""
        return levels.float().repeat_interleave(self.scheme.tokens_per_group, dim=2)


def intrinsic_levels(x: Tensor, left_out: Tensor, kmeans: bool) -> Tensor:
    """v_min, v1, v2 and v_max of blocks of elements, as `IntrinsicValues.of` finds them; zeros where nothing counts.

    x: [..., n] float32. left_out: [..., n] bool. Returns [..., 4] float64.
    """
    elements = x.double()
    low = elements.masked_fill(left_out, torch.inf).amin(-1, keepdim=True)
    high = elements.masked_fill(left_out, -torch.inf).amax(-1, keepdim=True)
    low, high = (end.masked_fill(left_out.all(-1, keepdim=True), 0) for end in (low, high))
    inner = _two_means(elements, left_out) if kmeans else _two_peaks(elements, left_out, low, high)
    return torch.cat([low, inner.clamp(low, high), high], dim=-1)


def _two_peaks(elements: Tensor, left_out: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Centers of the two fullest bins between low and high: [..., 2], ascending."""
    width = (high - low) / BINS
    bins = ((elements - low) / width.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, BINS - 1).long()
    counts = torch.zeros(*elements.shape[:-1], BINS, dtype=torch.int64, device=elements.device)
    counts.scatter_add_(-1, bins, (~left_out).long())
    fullest = counts.sort(dim=-1, stable=True).indices[..., -2:].sort(-1).values
    return low + (fullest + 0.5) * width


def _two_means(elements: Tensor, left_out: Tensor) -> Tensor:
    """Means of the two clusters with the least squared error, a prefix and the rest of the sorted elements: [..., 2]."""
    ascending = elements.masked_fill(left_out, torch.inf).sort(-1).values
    total = ascending.masked_fill(ascending.isinf(), 0).cumsum(-1)
    left, right = total[..., :-1], total[..., -1:] - total[..., :-1]
    count = torch.arange(1, elements.shape[-1], device=elements.device, dtype=torch.int64)
    rest = (~left_out).sum(-1, keepdim=True) - count
    explained = (left**2 / count + right**2 / rest.clamp(min=1)).masked_fill(rest < 1, -torch.inf)
    split = explained.argmax(-1, keepdim=True)  # the least error is the most explained
    means = [(part / size).gather(-1, split) for part, size in ((left, count), (right, rest.clamp(min=1)))]
    return torch.cat(means, dim=-1)
