"""Calibrating a model: keys before the rotary embedding, values and their gradients, captured through the cache interface."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrowkv import __version__
from narrowkv.attention import Rope
from narrowkv.calibration import Calibration, Fingerprint, Fit
from narrowkv.errors import ActivationError, CalibrationError, RecipeError
from narrowkv.integrations.interface import InterceptingCache, Step, model_attention, prepare, require_step
from narrowkv.integrations.probe import AttentionFacts, EmptyLayer
from narrowkv.methods import LayerSchemes, Recipe, get_recipe

# layer, keys unrotated, values: both [batch, kv_heads, tokens, head_dim]
Listener = Callable[[int, Tensor, Tensor], None]


class CaptureLayer(EmptyLayer):
    """Stores nothing; hands keys and values to a listener."""

    def __init__(self, index: int, rope: Rope | None, listener: Listener):
        super().__init__()
        self.rope = rope
        self.index = index
        self.listener = listener
        self.step: Step | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        step, self.step = require_step(self.step), None
        self.listener(self.index, key_states, value_states)
        handle = CaptureHandle(self.rope, step, key_states, value_states)
        return handle, handle


@dataclass(frozen=True)
class CaptureHandle:
    """Lets the model's own attention go on with what was captured."""

    rope: Rope | None
    step: Step
    keys: Tensor
    values: Tensor

    def attend(self, module: nn.Module, query: Tensor, scaling: float, **kwargs: Any) -> Tensor:
        keys = self.keys
        if self.rope:
            query, keys = (self.rope.rotate(x, self.step.positions) for x in (query, keys))
        output, _ = model_attention(module, query, keys, self.values, self.step.mask, scaling=scaling, **kwargs)
        return output


class CaptureCache(InterceptingCache):
    """A cache that shows a listener what every layer would store. facts: as `prepare` returns them."""

    def __init__(self, facts: list[AttentionFacts], listener: Listener):
        super().__init__(layers=[CaptureLayer(i, layer.rope, listener) for i, layer in enumerate(facts)])


@contextlib.contextmanager
def _without_weight_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no gradient for any weight, restored afterwards."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        model.train(training)
        for parameter, requires in wanted:
            parameter.requires_grad_(requires)


@dataclass(frozen=True)
class Need:
    """What a recipe asks of one layer's data. Bits and Q-Norm only matter when a codebook is read off, so recipes that
    differ in nothing else share their fits.
    """

    schemes: LayerSchemes
    sinks: int

    @classmethod
    def of(cls, recipe: Recipe, layer: int) -> "Need":
        pair = recipe.schemes(layer)
        keys, values = (
            replace(scheme, bits=4, qnorm=False) if scheme.datatype == "nuq" else scheme for scheme in (pair.keys, pair.values)
        )
        return cls(LayerSchemes(keys, values), recipe.sinks)


Fits = list[dict[Need, tuple[Fit, Fit]]]  # by layer


@torch.inference_mode(False)  # gradients are needed, wherever this is called from
def calibrate_many(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipes: Sequence[Recipe | str],
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Calibration]:
    """Learn several recipes from the same two passes over the data.

    batches: token ids [batch, tokens] int64, without padding; a single tensor is taken row by row. on_batch: called with
    (batches done, batches in both passes). Returns one Calibration per recipe. Raises CalibrationError where the data is
    empty, ActivationError where the model computes NaN or infinity.
    """
    chosen = [get_recipe(recipe) for recipe in recipes]
    data = [batch for batch in (batches.split(1) if isinstance(batches, Tensor) else batches) if batch.numel()]
    if not data or any(batch.dim() != 2 or batch.shape[1] < 2 for batch in data):
        raise CalibrationError(
            "Calibration needs batches of token ids [batch, tokens] of 2 tokens or more; give it more text."
        )
    facts = prepare(model)
    for recipe in chosen:
        if max(batch.shape[1] for batch in data) <= recipe.sinks + 1:
            raise CalibrationError(
                f"Sequences must be longer than the {recipe.sinks} sinks of {recipe.name}; give longer ones."
            )
        if any(not 0 <= layer < len(facts) for layer in recipe.layers):
            raise RecipeError(
                f"Recipe {recipe.name} names layers {sorted(recipe.layers)}; the model has 0 to {len(facts) - 1}."
            )
    needs = [{Need.of(recipe, i) for recipe in chosen} for i in range(len(facts))]
    fits: Fits = [{need: (Fit(need.schemes.keys), Fit(need.schemes.values)) for need in layer} for layer in needs]
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if on_batch:
            on_batch(done, 2 * len(data))

    with _without_weight_gradients(model):
        for batch in data:
            _run(model, facts, batch, _range_listener(fits), gradients=False)
            report()
        for batch in data:
            _run(model, facts, batch, _codebook_listener(fits), gradients=True)
            report()
    provenance = {
        "narrowkv": __version__,
        "sequences": sum(batch.shape[0] for batch in data),
        "tokens": sum(batch.numel() for batch in data),
    }
    calibrations = []
    for recipe in chosen:
        layers = []
        for i in range(len(facts)):
            schemes, (keys, values) = recipe.schemes(i), fits[i][Need.of(recipe, i)]
            shape = (facts[i].kv_heads, facts[i].head_dim)
            layers.append((keys.quantizer(shape, schemes.keys), values.quantizer(shape, schemes.values)))
        calibrations.append(Calibration(recipe, Fingerprint.of(model), layers, dict(provenance)))
    return calibrations


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipe: Recipe | str,
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Learn a recipe's tables from a model and token ids; see `calibrate_many`."""
    return calibrate_many(model, batches, [recipe], on_batch=on_batch)[0]


def _run(model: PreTrainedModel, facts: list[AttentionFacts], batch: Tensor, listener: Listener, *, gradients: bool) -> None:
    """One forward pass with a listener, and a backward pass of the summed loss if asked."""
    with torch.set_grad_enabled(gradients):
        ids = batch.to(model.device).clone()  # an ordinary tensor, wherever the batch was made
        logits = model(ids, past_key_values=CaptureCache(facts, listener), use_cache=True).logits
        if not torch.isfinite(logits[:, -1]).all():
            raise ActivationError("The model computes NaN or infinity on the calibration text; check its weights and dtype.")
        if gradients:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            loss.backward()


def _tokens(x: Tensor, skip: int) -> Tensor:
    """[batch, kv_heads, tokens, head_dim] -> [samples, kv_heads, head_dim], the first `skip` tokens of each row left out."""
    return x.detach()[:, :, skip:].transpose(1, 2).flatten(0, 1)


def _range_listener(fits: Fits) -> Listener:
    def listen(layer: int, keys: Tensor, values: Tensor) -> None:
        for need, pair in fits[layer].items():
            for fit, numbers in zip(pair, (keys, values), strict=True):
                fit.see_range(_tokens(numbers, need.sinks))

    return listen


def _codebook_listener(fits: Fits) -> Listener:
    def listen(layer: int, keys: Tensor, values: Tensor) -> None:
        for side, numbers in enumerate((keys, values)):
            if not numbers.requires_grad:
                numbers.requires_grad_()
            numbers.register_hook(_when_gradient_known(fits[layer], side, numbers.detach()))

    return listen


def _when_gradient_known(fits: dict[Need, tuple[Fit, Fit]], side: int, numbers: Tensor) -> Callable[[Tensor], None]:
    def see(gradient: Tensor) -> None:
        for need, pair in fits.items():
            pair[side].see_codebook(_tokens(numbers, need.sinks), _tokens(gradient, need.sinks))

    return see
