"""What static scales lose, measured on text that they were not made from, and the refusal of those that break a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from narrowkv.errors import CalibrationError
from narrowkv.evaluate.perplexity import divergences
from narrowkv.exports.ranges import Ranges, observe_stored, variances
from narrowkv.exports.static_scales import StaticQuantization
from narrowkv.integrations.probe import AttentionLayerInfo, ModelInfo, text_config
from narrowkv.integrations.versions import CACHE

MOST_LOSS = 1.0  # nats per token, strict: int4 scales of tensors lose 1.8 on Qwen2.5-Coder-0.5B, the worst of our recipes 0.5


@dataclass(frozen=True)
class Rounding:
    """What rounding does to the keys, or values, of one layer.

    largest: magnitude that the scales are made for. clipped: share of elements beyond the range. noise: of the worst head, the
    variance of the error over the tokens of a sequence, divided by the squares of what tells tokens apart: elements less the
    projection's bias. Keys are taken at positions spread over the model's context. bias: the bias's length over that of the
    rest of a key, or value, in the head where that is most; 0 without.
    """

    layer: int
    side: str
    largest: float
    clipped: float
    noise: float
    bias: float


class _Sums:
    """Running sums of the keys or values of a layer; error, spread: [kv_heads] float64."""

    def __init__(self, quantization: StaticQuantization, largest: Tensor, bias: Tensor | None):
        self.quantization, self.scale, self.bias = quantization, quantization.scales(largest), bias
        self.error, self.spread = torch.zeros(2, len(largest), dtype=torch.float64, device=largest.device)
        self.clipped = self.count = self.tokens = 0

    def add(self, stored: Tensor, projected: Tensor) -> None:
        """Elements as they are stored and, before any rotation, as projected: [batch, kv_heads, tokens, head_dim] each."""
        projected = projected.float()
        rest = projected if self.bias is None else projected - self.bias.to(projected.device)[:, None]
        factor = _squares(stored).sum() / _squares(projected).sum()  # some rotary embeddings scale besides
        self.error += variances(self.quantization.rounded(stored, self.scale) - stored).sum((0, 2))
        self.spread += _squares(rest) * factor
        self.tokens += stored.shape[0] * stored.shape[2]
        self.clipped += int((stored.abs() > self.scale[:, None] * self.quantization.limit).sum())
        self.count += stored.numel()

    def rounding(self, layer: int, side: str) -> Rounding:
        spread = self.spread.clamp(min=torch.finfo(torch.float64).tiny)
        noise, bias = (self.error / spread).max().item(), 0.0
        if self.bias is not None:
            bias = (_squares(self.bias[None, :, None]) * self.tokens / spread).sqrt().max().item()
        largest = self.scale.max().item() * self.quantization.limit
        return Rounding(layer, side, largest, self.clipped / self.count, noise, bias)


def _squares(x: Tensor) -> Tensor:
    """[kv_heads] float64: sums of squares of x [batch, kv_heads, tokens, head_dim]."""
    return x.square().sum((0, 2, 3), dtype=torch.float64)


def measure_rounding(
    model: PreTrainedModel,
    info: ModelInfo,
    quantization: StaticQuantization,
    ranges: Sequence[Ranges],
    batches: Sequence[Tensor],
    on_batch: Callable[[], None] | None = None,
) -> list[Rounding]:
    """What rounding does to the keys and values of every layer over token ids, [batch, tokens] int64 each."""
    keys_of = [_Sums(quantization, one.keys, layer.constants.keys) for layer, one in zip(info.attention, ranges, strict=True)]
    values_of = [
        _Sums(quantization, one.values, layer.constants.values) for layer, one in zip(info.attention, ranges, strict=True)
    ]

    def see(i: int, stored: Tensor, keys: Tensor, values: Tensor) -> None:
        keys_of[i].add(stored, keys)
        values_of[i].add(values, values)

    observe_stored(model, info, batches, see, on_batch)
    return [
        sums.rounding(layer.layer, side)
        for i, layer in enumerate(info.attention)
        for side, sums in (("keys", keys_of[i]), ("values", values_of[i]))
    ]


def require_bearable(quantization: StaticQuantization, found: Sequence[Rounding], loss: float) -> None:
    """Raise CalibrationError, with the cause, where scales break a model. loss: as `divergence` returns it."""
    if loss <= MOST_LOSS:
        return
    worst = max((one for one in found if one.side == "keys"), key=lambda one: one.noise)
    cause = "a few large elements set"
    if worst.bias > 1:
        cause = f"a bias {worst.bias:.0f} times as large as the rest of a key sets"
    raise CalibrationError(
        f"Symmetric {quantization.datatype} with a scale for each {quantization.strategy} would break this model: it loses "
        f"{loss:.1f} nats per token, since in layer {worst.layer} {cause} the scale; choose more bits or finer scales, or an "
        "engine that reads NarrowKV's recipes, which take biases out."
    )


class RoundedCache(DynamicCache):
    """transformers' own cache, of which every element has been stored with static scales: nothing is packed."""

    def __init__(
        self, config: Any, quantization: StaticQuantization, info: Sequence[AttentionLayerInfo], ranges: Sequence[Ranges]
    ):
        super().__init__(config=config)
        self.quantization = quantization
        self.scales = {
            layer.layer: (quantization.scales(one.keys), quantization.scales(one.values))
            for layer, one in zip(info, ranges, strict=True)
        }

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = (
            self.quantization.rounded(x, scale).to(x.dtype)
            for x, scale in zip((key_states, value_states), self.scales[layer_idx], strict=True)
        )
        return super().update(keys, values, layer_idx, *args, **kwargs)


@torch.inference_mode()
def divergence(
    model: PreTrainedModel,
    info: ModelInfo,
    quantization: StaticQuantization,
    ranges: Sequence[Ranges],
    batches: Sequence[Tensor],
    on_batch: Callable[[], None] | None = None,
) -> float:
    """KL divergence from the unquantized model in nats per token, strict, over token ids [1, tokens] int64 each."""
    found = []
    for ids in batches:
        ids = ids.to(model.device)
        exact = model(ids, use_cache=False).logits[0, :-1]
        cache = RoundedCache(text_config(model), quantization, info.attention, ranges)
        found.append(divergences(exact, model(ids, **{CACHE: cache}, use_cache=True).logits[0, :-1]))
        if on_batch:
            on_batch()
    return torch.cat(found).double().mean().item()
