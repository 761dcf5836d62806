"""How large keys, rotated to any position, and values become: what static scales are made for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.attention import AnyRope, Rope
from narrowkv.defaults import REFERENCE_TOKENS
from narrowkv.integrations.calibrator import observe_layers
from narrowkv.integrations.probe import AttentionLayerInfo, ModelInfo, text_config


@dataclass
class Ranges:
    """The largest magnitudes of a layer's channels: [kv_heads, head_dim] float32 each.

    keys: after the rotary embedding, at whatever position. values: as they are.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, layer: AttentionLayerInfo, device: torch.device) -> "Ranges":
        """Ranges of a layer that has stored nothing yet."""
        keys, values = torch.zeros(2, layer.kv_heads, layer.head_dim, dtype=torch.float32, device=device)
        return cls(keys, values)

    def widen(self, keys: Tensor, values: Tensor) -> None:
        """Take in magnitudes [batch, kv_heads, tokens, head_dim]."""
        self.keys = torch.maximum(self.keys, keys.float().amax((0, 2)))
        self.values = torch.maximum(self.values, values.float().amax((0, 2)))


def any_position(rotated: Tensor, rope: AnyRope | None, rope_state: Tensor | None) -> Tensor:
    """The largest magnitude that each channel of keys has at any position: [batch, kv_heads, tokens, head_dim].

    rotated: keys after the rotary embedding, of the same shape. A rotation leaves the length of a pair of channels as it is,
    and slow pairs barely rotate within a calibration text, so what they show there does not bound them later.
    """
    if rope is None or rope_state is None:
        return rotated.abs()
    rotary = 2 * rope.cos_sin(rope_state)[0].shape[-1]
    pairs, rest = rotated[..., :rotary], rotated[..., rotary:].abs()
    first, second = pairs.unflatten(-1, (-1, 2)).unbind(-1) if rope.interleaved else pairs.chunk(2, dim=-1)
    lengths = torch.hypot(first, second)
    both = (lengths, lengths)
    return torch.cat([torch.stack(both, -1).flatten(-2) if rope.interleaved else torch.cat(both, -1), rest], dim=-1)


def at_spread_positions(model: PreTrainedModel, rope: AnyRope | None, keys: Tensor, rotated: Tensor) -> Tensor:
    """Keys [batch, kv_heads, tokens, head_dim] float32 as if the tokens were spread over the whole context of the model.

    Slow pairs of channels are as good as constant within a short text, and not in a long one. keys, rotated: before and after
    the rotary embedding; `rotated` is returned where no position determines the angles.
    """
    if not isinstance(rope, Rope):
        return rotated.float()
    context = getattr(text_config(model), "max_position_embeddings", REFERENCE_TOKENS)
    positions = torch.linspace(0, context - 1, keys.shape[2], dtype=torch.float64, device=keys.device)
    return rope.rotate(keys.float(), positions.long()[None])


def observe_stored(
    model: PreTrainedModel,
    info: ModelInfo,
    batches: Sequence[Tensor],
    see: Callable[[int, Tensor, Tensor, Tensor], None],
    on_batch: Callable[[], None] | None = None,
) -> None:
    """Call `see` with the number of each attention layer and what it would store of each batch, without gradients.

    That is keys as `at_spread_positions` returns them, keys before any rotation, and values, the first and the last float32.
    """

    def observe(i: int, keys: Tensor, rotated: Tensor, values: Tensor, rope_state: Tensor | None) -> None:
        keys = keys.detach()
        see(i, at_spread_positions(model, info.attention[i].rope, keys, rotated.detach()), keys, values.detach().float())

    observe_layers(model, info, batches, observe, on_batch=on_batch)


def variances(x: Tensor) -> Tensor:
    """Squares of what tokens differ by from the mean of their sequence, summed: x [batch, kv_heads, tokens, head_dim].

    What all tokens of a sequence have in common shifts all scores alike, which softmax does not see. Returns [batch, kv_heads,
    head_dim] float64.
    """
    return (x - x.mean(2, keepdim=True)).square().sum(2, dtype=torch.float64)


def observe_ranges(
    model: PreTrainedModel, info: ModelInfo, batches: Sequence[Tensor], on_batch: Callable[[], None] | None = None
) -> list[Ranges]:
    """The ranges of every attention layer over token ids, [batch, tokens] int64 each.

    info: as `model_info_for` returns it. Raises ActivationError where the model computes NaN or infinity.
    """
    found = [Ranges.of(layer, model.device) for layer in info.attention]

    def observe(i: int, keys: Tensor, rotated: Tensor, values: Tensor, rope_state: Tensor | None) -> None:
        found[i].widen(any_position(rotated.detach().float(), info.attention[i].rope, rope_state), values.detach().abs())

    observe_layers(model, info, batches, observe, on_batch=on_batch)
    return found
