"""Where to end a range: few levels reach less far than the largest elements, so that the others are rounded less."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.exports.ranges import Ranges, observe_stored, variances
from narrowkv.exports.static_scales import StaticQuantization
from narrowkv.integrations.probe import ModelInfo

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the largest magnitude
FEW_BITS = 4  # up to which it pays


class _Errors:
    """Errors of each ratio for the keys or values of a layer. sums: [ratios, kv_heads, head_dim] float64."""

    def __init__(self, quantization: StaticQuantization, largest: Tensor):
        self.quantization, self.largest = quantization, largest
        self.sums = torch.zeros(len(RATIOS), *largest.shape, dtype=torch.float64, device=largest.device)

    def add(self, x: Tensor) -> None:
        """Elements [batch, kv_heads, tokens, head_dim]."""
        for sums, ratio in zip(self.sums, RATIOS, strict=True):
            scale = self.quantization.scales(self.largest * ratio)
            sums += variances(self.quantization.rounded(x, scale) - x).sum(0)

    def best(self) -> Tensor:
        """The magnitudes to make scales of, [kv_heads, head_dim]: what shares a scale has one ratio."""
        shared = self.quantization.shared
        sums = self.sums.sum(shared, keepdim=True) if shared else self.sums
        ratios = torch.tensor(RATIOS, dtype=torch.float32, device=self.largest.device)
        return self.largest * ratios[sums.argmin(0)]


def fitted_ranges(
    model: PreTrainedModel,
    info: ModelInfo,
    quantization: StaticQuantization,
    ranges: Sequence[Ranges],
    batches: Sequence[Tensor],
    on_batch: Callable[[], None] | None = None,
) -> list[Ranges]:
    """Ranges that end where the error varies least over the tokens of a sequence; as they are with more than 4 bits.

    ranges: as `observe_ranges` returns them for the same batches of token ids, [batch, tokens] int64 each. The error that all
    tokens have in common is left out, as in `measure_rounding`.
    """
    if quantization.bits > FEW_BITS:
        return list(ranges)
    errors = [(_Errors(quantization, one.keys), _Errors(quantization, one.values)) for one in ranges]

    def see(i: int, stored: Tensor, keys: Tensor, values: Tensor) -> None:
        of_keys, of_values = errors[i]
        of_keys.add(stored)
        of_values.add(values)

    observe_stored(model, info, batches, see, on_batch)
    return [Ranges(of_keys.best(), of_values.best()) for of_keys, of_values in errors]
