"""What an attention module does to every key and value alike, found by running it: its projections' bias, and a norm's gain.

Nothing is read from a family's weights, so fused projections, LoRA and tensor parallelism need no special case.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from narrowkv.attention import AnyRope
from narrowkv.calibration.fit import smoothing
from narrowkv.codec import AnyQuantizer, Quantizer, Scheme
from narrowkv.store.bias import Bias

TOLERANCE = 2e-2  # of the largest element: bfloat16 rounds
GAIN_POWER = 0.5  # of a norm's gain, by which keys are divided: 1 makes small channels of Gemma 3 too coarse


@dataclass(frozen=True)
class Constants:
    """What is known of the keys and values of a layer without calibration; all [kv_heads, head_dim] float32, or None.

    keys, values: what the projections add. gain: what a norm multiplies the channels of keys by.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    gain: Tensor | None = None


NOTHING_KNOWN = Constants()


@dataclass(frozen=True)
class ConstantKinds:
    """Which of the `Constants` a layer has."""

    keys: bool = False
    values: bool = False
    gain: bool = False


# runs a module again on its hidden states times a factor, without rotary embedding: keys and values as the cache gets them
Run = Callable[[float], tuple[Tensor, Tensor]]


def constants_of(module: nn.Module, run: Run) -> Constants:
    """What is found of an attention module by running it."""
    whole, half, nothing = (run(factor) for factor in (1.0, 0.5, 0.0))
    keys, values = (_bias(*parts) for parts in zip(whole, half, nothing, strict=True))
    return Constants(keys, values, None if keys is not None else _gain(module, run, whole[0]))


@torch.enable_grad()
def constant_kinds(module: nn.Module, run: Run) -> ConstantKinds:
    """Which constants a module on the meta device has, by the vectors among its parameters that keys and values come from.

    A projection adds its own; whatever else a vector does, a norm does.
    """
    (keys_added, keys_scaled), (values_added, values_scaled) = (_vectors_of(x, module) for x in run(1.0))
    return ConstantKinds(
        keys=keys_added > 0 and not keys_scaled, values=values_added > 0 and not values_scaled, gain=keys_scaled == 1
    )


def _vectors_of(x: Tensor, module: nn.Module) -> tuple[int, int]:
    """How many vectors of a module's parameters x comes from: those that a projection adds, and all others."""
    vectors = {id(parameter) for parameter in module.parameters() if parameter.dim() == 1}
    added = others = 0
    waiting, met = [x.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        sources = [source for source, _ in node.next_functions]
        waiting += sources
        found = sum(id(getattr(source, "variable", None)) in vectors for source in sources)
        if node.name() == "AddmmBackward0":
            added += found
        else:
            others += found
    return added, others


def _bias(whole: Tensor, half: Tensor, nothing: Tensor) -> Tensor | None:
    """What is added to all tokens alike; None where it is nothing, or where elements are no multiple of the input next to it.

    Of the whole input, of half of it and of zeros: [1, kv_heads, tokens, head_dim] each.
    """
    if whole.is_meta or not nothing.isfinite().all():
        return None
    bias, tolerance = nothing[:, :, :1].float(), TOLERANCE * whole.float().abs().max()
    alike = (nothing.float() - bias).abs().max() <= tolerance
    straight = (half.float() - (whole.float() + bias) / 2).abs().max() <= tolerance
    return bias[0, :, 0].clone() if alike and straight and bool(bias.any()) else None


def _gain(module: nn.Module, run: Run, keys: Tensor) -> Tensor | None:
    """What the norm whose results are the keys multiplies channels by, if there is one."""
    found: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(norm: nn.Module, args: tuple, output: object) -> None:
        if args and isinstance(output, Tensor) and isinstance(args[0], Tensor) and output.numel() == keys.numel():
            found.append((norm, args[0], output))

    hooks = [
        part.register_forward_hook(note)
        for part in module.modules()
        if [parameter.numel() for parameter in part.parameters()] in ([keys.shape[3]], [keys.shape[1] * keys.shape[3]])
    ]
    try:
        run(1.0)
    finally:
        for hook in hooks:
            hook.remove()
    for norm, given, output in found:
        layout = _as_keys(output, keys)
        if layout is None:
            continue
        signs = torch.ones_like(given)  # of mean 0 and variance 1, so that norms of every kind only multiply them
        signs[..., ::2] = -1
        gain = _as_keys(norm(signs) * signs, keys, same=False)
        assert gain is not None
        return gain[0, :, 0].float().abs().clone()
    return None


def _as_keys(x: Tensor, keys: Tensor, same: bool = True) -> Tensor | None:
    """x laid out as keys [1, kv_heads, tokens, head_dim]; None where it would not be the same elements."""
    _, heads, tokens, dim = keys.shape
    laid = x if x.shape == keys.shape else x.reshape(1, tokens, heads, dim).transpose(1, 2)
    return laid if not same or torch.equal(laid, keys) else None


def with_gain(quantizer: AnyQuantizer, constants: Constants) -> AnyQuantizer:
    """The quantizer of keys whose norm has a gain, which is folded into the query where the scheme has it so."""
    if constants.gain is None or not quantizer.scheme.takes_gain_out or not isinstance(quantizer, Quantizer):
        return quantizer
    factors = smoothing(constants.gain, GAIN_POWER)
    return quantizer if torch.allclose(factors, torch.ones_like(factors)) else replace(quantizer, smooth=factors)


def bias_of(constants: Constants, rope: AnyRope | None, keys: Scheme, values: Scheme, device: torch.device) -> Bias:
    """What a store takes out of the keys and values of a layer, by their schemes; its position buffer is yet to be given."""
    after = rope is not None and not keys.transform.pre_rope
    key_bias = constants.keys if keys.takes_bias_out else None
    of_values = constants.values if values.takes_bias_out else None
    key_bias, of_values = (None if part is None else part.to(device) for part in (key_bias, of_values))
    return Bias(key_bias, of_values, rope if after else None)
