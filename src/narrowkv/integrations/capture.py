"""Calibrating a model: keys before the rotary embedding, values and their gradients, captured through the cache interface."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrowkv import __version__
from narrowkv.attention import AUTO
from narrowkv.calibration import Calibration, Fingerprint
from narrowkv.calibration.learning import LayerFits, learn
from narrowkv.calibration.processes import Group, is_split, reduced
from narrowkv.defaults import DENSE
from narrowkv.errors import ActivationError, CalibrationError, UnsupportedModelError
from narrowkv.integrations.passing import PassingCache, PassingLayer
from narrowkv.integrations.preparation import facts_for
from narrowkv.integrations.probe import AttentionFacts, ModelFacts, evaluating, own_layers, text_config
from narrowkv.integrations.versions import CACHE
from narrowkv.methods import Recipe, get_recipe
from narrowkv.store.bias import Bias

# place among the attention layers, keys before and after the rotary embedding, values, what has turned the keys
LayerListener = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], None]


def capture_cache(model: PreTrainedModel, facts: ModelFacts, listener: LayerListener, dense: bool = False) -> PassingCache:
    """A cache that shows a listener what every attention layer would store. facts: as `facts_for` returns them."""
    layers = own_layers(text_config(model))
    for i, fact in enumerate(facts.attention):
        layers[fact.layer] = PassingLayer(fact.rope, functools.partial(listener, i), dense)
    return PassingCache(layers, dense=dense)


def fits_for(fact: AttentionFacts, recipes: Sequence[Recipe]) -> LayerFits:
    """What learns some recipes from what such an attention module stores."""
    known = fact.constants
    biases = (Bias(known.keys, known.values), Bias(known.rotated, known.values, fact.rope))
    return LayerFits(recipes, fact.layer, (fact.kv_heads, fact.head_dim), biases)


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


@torch.inference_mode(False)  # gradients are needed, wherever this is called from
def show_layers(
    model: PreTrainedModel,
    facts: ModelFacts,
    data: Iterable[Tensor],
    listener: LayerListener,
    *,
    gradients: bool = False,
    dense: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> None:
    """Run a model over batches and show a listener what every attention layer would store.

    facts: as `facts_for` returns them. data: token ids [batch, tokens] int64. gradients: the summed loss goes backwards too,
    so that a hook put on a shown tensor learns its gradient. Raises ActivationError where the model computes NaN or infinity.
    """
    with _without_weight_gradients(model):
        for batch in data:
            _run(model, capture_cache(model, facts, listener, dense), batch, gradients=gradients)
            if on_batch:
                on_batch()


@torch.inference_mode(False)  # as above, and what is learned must not belong to inference mode
def calibrate_many(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipes: Sequence[Recipe | str],
    *,
    backend: str = AUTO,
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
    fits = {fact.layer: fits_for(fact, chosen) for fact in facts.attention}
    by_place = list(fits.values())
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if on_batch:
            on_batch(done, 2 * len(data))

    dense = backend == DENSE
    passes = (
        (lambda place, *numbers: by_place[place].see_range(*numbers), False, LayerFits.merge_ranges),
        (lambda place, *numbers: by_place[place].see_codebook(*numbers), True, LayerFits.merge_codebooks),
    )
    for listener, gradients, merge in passes:
        show_layers(model, facts, data, listener, gradients=gradients, dense=dense, on_batch=report)
        for layer in by_place if group is not None else ():
            merge(layer, group)
    counts = torch.tensor([sum(batch.shape[0] for batch in data), sum(batch.numel() for batch in data)])
    sequences, tokens = (reduced(counts, "SUM", group) if group else counts).tolist()
    provenance = {"narrowkv": __version__, "sequences": sequences, "tokens": tokens}
    fingerprint, calibrations = Fingerprint.of(model), []
    shapes = {layer: fitted.shape for layer, fitted in fits.items()}
    for recipe in chosen:
        learned = learn(recipe, fits)
        told = provenance | ({"allocation": learned.report} if learned.report else {})
        calibrations.append(Calibration(learned.recipe, fingerprint, learned.layers, dict(shapes), told))
    return calibrations


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipe: Recipe | str,
    *,
    backend: str = AUTO,
    group: Group = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Learn a recipe's tables from a model and token ids; see `calibrate_many`."""
    return calibrate_many(model, batches, [recipe], backend=backend, group=group, on_batch=on_batch)[0]


def _run(model: PreTrainedModel, cache: PassingCache, batch: Tensor, *, gradients: bool) -> None:
    """One forward pass, and a backward pass of the summed loss if asked."""
    with torch.set_grad_enabled(gradients):
        ids = batch.to(model.device).clone()  # an ordinary tensor, wherever the batch was made
        logits = model(ids, **{CACHE: cache}, use_cache=True).logits
        if not torch.isfinite(logits[:, -1]).all():
            raise ActivationError("The model computes NaN or infinity on the calibration text; check its weights and dtype.")
        if gradients:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            loss.backward()
