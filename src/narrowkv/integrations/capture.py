"""Calibrating a model: keys before the rotary embedding, values and their gradients, captured through the cache interface."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrowkv import __version__
from narrowkv.calibration import Calibration, Fingerprint, Fit
from narrowkv.calibration.processes import Group, is_split, reduced
from narrowkv.errors import ActivationError, CalibrationError, UnsupportedModelError
from narrowkv.integrations.dense import DENSE
from narrowkv.integrations.passing import PassingCache, PassingLayer
from narrowkv.integrations.preparation import facts_for
from narrowkv.integrations.probe import ModelFacts, evaluating, own_layers, text_config
from narrowkv.methods import LayerSchemes, Recipe, get_recipe

# place among the attention layers, keys before and after the rotary embedding, values
LayerListener = Callable[[int, Tensor, Tensor, Tensor], None]


def capture_cache(model: PreTrainedModel, facts: ModelFacts, listener: LayerListener, dense: bool = False) -> PassingCache:
    """A cache that shows a listener what every attention layer would store. facts: as `facts_for` returns them."""
    layers = own_layers(text_config(model))
    for i, fact in enumerate(facts.attention):
        layers[fact.layer] = PassingLayer(fact.rope, functools.partial(listener, i), dense)
    return PassingCache(layers, dense=dense)


@contextlib.contextmanager
def _without_weight_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no gradient for any weight, restored afterwards."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
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
    backend: str = "torch",
    group: Group = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Calibration]:
    """Learn several recipes from the same two passes over the data.

    batches: token ids [batch, tokens] int64, without padding; a single tensor is taken row by row. backend: that of the
    caches to be made, of which only `dense` matters here. group: of torch.distributed, whose processes each hold the model and
    give a part of the data; all get what one process would have learned from all of it. on_batch: called with (batches done,
    batches in both passes). Returns one Calibration per recipe. Raises CalibrationError where the data is empty,
    ActivationError where the model computes NaN or infinity, UnsupportedModelError and RecipeError as PackedCache does.
    """
    chosen = [get_recipe(recipe) for recipe in recipes]
    data = [batch for batch in (batches.split(1) if isinstance(batches, Tensor) else batches) if batch.numel()]
    if not data or any(batch.dim() != 2 or batch.shape[1] < 2 for batch in data):
        raise CalibrationError(
            "Calibration needs batches of token ids [batch, tokens] of 2 tokens or more; give it more text."
        )
    if any(is_split(parameter) for parameter in model.parameters()):
        raise UnsupportedModelError(
            "A model that is split over processes cannot be calibrated; calibrate it whole (several processes may share the "
            "text), and use the calibration with the split model."
        )
    facts = facts_for(model, backend, chosen)
    for recipe in chosen:
        if max(batch.shape[1] for batch in data) <= recipe.sinks + 1:
            raise CalibrationError(
                f"Sequences must be longer than the {recipe.sinks} sinks of {recipe.name}; give longer ones."
            )
    needs = [{Need.of(recipe, fact.layer) for recipe in chosen} for fact in facts.attention]
    fits: Fits = [{need: (Fit(need.schemes.keys), Fit(need.schemes.values)) for need in layer} for layer in needs]
    done = 0

    def every_fit() -> list[Fit]:  # in the same order in every process
        named = ((str(need), pair) for layer in fits for need, pair in layer.items())
        return [fit for _, pair in sorted(named, key=lambda item: item[0]) for fit in pair]

    def report() -> None:
        nonlocal done
        done += 1
        if on_batch:
            on_batch(done, 2 * len(data))

    dense = backend == DENSE
    passes = (
        (_range_listener(fits), False, Fit.merge_ranges),
        (_codebook_listener(fits), True, Fit.merge_codebook),
    )
    with _without_weight_gradients(model):
        for listener, gradients, merge in passes:
            for batch in data:
                _run(model, capture_cache(model, facts, listener, dense), batch, gradients=gradients)
                report()
            for fit in every_fit() if group is not None else ():
                merge(fit, group)
    counts = torch.tensor([sum(batch.shape[0] for batch in data), sum(batch.numel() for batch in data)])
    sequences, tokens = (reduced(counts, "SUM", group) if group else counts).tolist()
    provenance = {"narrowkv": __version__, "sequences": sequences, "tokens": tokens}
    fingerprint, calibrations = Fingerprint.of(model), []
    for recipe in chosen:
        layers, shapes = {}, {}
        for fact, fitted in zip(facts.attention, fits, strict=True):
            schemes, (keys, values) = recipe.schemes(fact.layer), fitted[Need.of(recipe, fact.layer)]
            shapes[fact.layer] = shape = (fact.kv_heads, fact.head_dim)
            layers[fact.layer] = (keys.quantizer(shape, schemes.keys), values.quantizer(shape, schemes.values))
        calibrations.append(Calibration(recipe, fingerprint, layers, shapes, dict(provenance)))
    return calibrations


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipe: Recipe | str,
    *,
    backend: str = "torch",
    group: Group = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Learn a recipe's tables from a model and token ids; see `calibrate_many`."""
    return calibrate_many(model, batches, [recipe], backend=backend, group=group, on_batch=on_batch)[0]


def _run(model: PreTrainedModel, cache: PassingCache, batch: Tensor, *, gradients: bool) -> None:
    """One forward pass, and a backward pass of the summed loss if asked."""
    with torch.set_grad_enabled(gradients):
        ids = batch.to(model.device).clone()  # an ordinary tensor, wherever the batch was made
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        if not torch.isfinite(logits[:, -1]).all():
            raise ActivationError("The model computes NaN or infinity on the calibration text; check its weights and dtype.")
        if gradients:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            loss.backward()


def _tokens(x: Tensor, skip: int) -> Tensor:
    """[batch, kv_heads, tokens, head_dim] -> [samples, kv_heads, head_dim], the first `skip` tokens of each row left out."""
    return x.detach()[:, :, skip:].transpose(1, 2).flatten(0, 1)


def _range_listener(fits: Fits) -> LayerListener:
    def listen(index: int, keys: Tensor, rotated: Tensor, values: Tensor) -> None:
        for need, (key_fit, value_fit) in fits[index].items():
            key_fit.see_range(_tokens(keys if need.schemes.keys.pre_rope else rotated, need.sinks))
            value_fit.see_range(_tokens(values, need.sinks))

    return listen


def _codebook_listener(fits: Fits) -> LayerListener:
    def listen(index: int, keys: Tensor, rotated: Tensor, values: Tensor) -> None:
        before = [(need, pair[0]) for need, pair in fits[index].items() if need.schemes.keys.pre_rope]
        after = [(need, pair[0]) for need, pair in fits[index].items() if not need.schemes.keys.pre_rope]
        of_values = [(need, pair[1]) for need, pair in fits[index].items()]
        for numbers, learning in ((keys, before), (rotated, after), (values, of_values)):
            if learning:
                numbers.register_hook(_when_gradient_known(learning, numbers.detach()))

    return listen


def _when_gradient_known(learning: list[tuple[Need, Fit]], numbers: Tensor) -> Callable[[Tensor], None]:
    def see(gradient: Tensor) -> None:
        for need, fit in learning:
            fit.see_codebook(_tokens(numbers, need.sinks), _tokens(gradient, need.sinks))

    return see
