"""Calibrating a model: keys before the rotary embedding, values and their gradients, captured through the cache interface."""

import contextlib
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrowkv._version import __version__
from narrowkv.attention import AUTO
from narrowkv.attention.rope import frames_of
from narrowkv.calibration import Calibration, Fingerprint
from narrowkv.calibration.distributed import Group, is_split, reduced
from narrowkv.calibration.layer_fits import LayerFits
from narrowkv.calibration.search import Learned, learn
from narrowkv.calibration.wrappers import require_head, unwrapped
from narrowkv.codec.surroundings import undisturbed
from narrowkv.defaults import DENSE
from narrowkv.errors import ActivationError, CalibrationError, NarrowKVWarning, UnsupportedModelError
from narrowkv.integrations.batches import token_batches
from narrowkv.integrations.hold import changed, evaluating
from narrowkv.integrations.observer import ObserverCache, ObserverLayer
from narrowkv.integrations.preparation import model_info_for
from narrowkv.integrations.probe import AttentionLayerInfo, ModelInfo, own_layers, text_config
from narrowkv.integrations.versions import CACHE
from narrowkv.methods import Recipe, get_recipe
from narrowkv.store.bias import Bias

# index among the attention layers, keys before and after the rotary embedding, values, what has rotated the keys
LayerObserver = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], None]
KEEP = "logits_to_keep"
DRAWN_TOGETHER = 64  # tokens whose probabilities are summed at a time
MOST_OF_FEW = 0.5  # of the Fisher information, that a hundredth of the tokens may have in most tensors without a warning
ALL_OF_FEW = 0.8  # in any tensor: on text that fits, Qwen2.5-Coder-0.5B has up to 0.68, and more than half in 5 tensors of 48


def observer_cache(model: PreTrainedModel, info: ModelInfo, observer: LayerObserver, dense: bool = False) -> ObserverCache:
    """A cache that shows a listener what every attention layer would store. info: as `model_info_for` returns them."""
    layers = own_layers(text_config(model))
    for i, layer_info in enumerate(info.attention):
        layers[layer_info.layer] = ObserverLayer(layer_info.rope, functools.partial(observer, i), dense)
    return ObserverCache(layers, dense=dense)


def fits_for(layer_info: AttentionLayerInfo, recipes: Sequence[Recipe], sliding_window: int | None = None) -> LayerFits:
    """What learns some recipes from what such an attention module stores; sliding_window: of its layer."""
    known = layer_info.constants
    biases = (Bias(known.keys, known.values), Bias(known.keys, known.values, layer_info.rope))
    frames = frames_of(layer_info.rope, layer_info.head_dim)
    return LayerFits(recipes, layer_info.layer, (layer_info.kv_heads, layer_info.head_dim), biases, sliding_window, frames)


@contextlib.contextmanager
def _without_weight_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no gradient for any weight, restored afterwards."""
    wanted: list[nn.Parameter] = []

    def freeze() -> Callable[[], None]:
        wanted.extend(parameter for parameter in model.parameters() if parameter.requires_grad)
        model.requires_grad_(False)
        return thaw

    def thaw() -> None:
        for parameter in wanted:
            parameter.requires_grad_()

    with changed(model, "frozen", freeze), evaluating(model):
        yield


@torch.inference_mode(False)  # gradients are needed, wherever this is called from
def observe_layers(
    model: PreTrainedModel,
    info: ModelInfo,
    data: Iterable[Tensor],
    observer: LayerObserver,
    *,
    gradients: bool = False,
    drawn: bool = False,
    dense: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> None:
    """Run a model over batches and show a listener what every attention layer would store.

    info: as `model_info_for` returns them. data: token ids [batch, tokens] int64. gradients: the summed loss goes backwards
    too, so that a hook put on a shown tensor learns its gradient. drawn: after that another loss does, on tokens that are
    drawn from what the model predicts. Raises ActivationError where the model computes NaN or infinity.
    """
    with _without_weight_gradients(model):
        for batch in data:
            _run(model, observer_cache(model, info, observer, dense), batch, gradients=gradients, drawn=drawn)
            if on_batch:
                on_batch()


@torch.inference_mode(False)  # as above, and what is learned must not belong to inference mode
def calibrate_many(
    model: PreTrainedModel,
    batches: Any,
    recipes: Sequence[Recipe | str],
    *,
    backend: str = AUTO,
    group: Group = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Calibration]:
    """Learn several recipes from the same two passes over the data.

    batches: token ids [n, tokens] int64, each row read alone, or an iterable of batches [batch, tokens]: tensors, arrays and
    lists of integers, or dictionaries with `input_ids` and perhaps `attention_mask`. recipes: names or Recipes. backend: that
    of the caches to be made, of which only `dense` matters here. group: of torch.distributed, each of whose processes has the
    model and a part of the data; all get what one process would have learned from all of it. on_batch: called with (batches
    done, batches in both passes). Returns one Calibration per recipe, and warns (NarrowKVWarning) where few tokens outweigh
    all others or the loss predicted exceeds that of guessing. The formulas are named where they are computed
    (`calibration/fit.py`, `calibration/trellis_fit.py`). Raises CalibrationError where the data is empty, is no token ids, or
    no gradient comes back, ActivationError where the model computes NaN or infinity, UnsupportedModelError and RecipeError as
    PackedCache does.
    """
    model, chosen = unwrapped(model), [get_recipe(recipe) for recipe in recipes]
    require_head(model)
    if any(is_split(parameter) for parameter in model.parameters()):
        raise UnsupportedModelError(
            "A model that is split over processes cannot be calibrated; calibrate it whole (several processes may share the "
            "text), and use the calibration with the split model."
        )
    data = token_batches(batches, model)
    info = model_info_for(model, backend, chosen)
    for recipe in chosen:
        if max(batch.shape[1] for batch in data) <= recipe.sinks + 1:
            raise CalibrationError(
                f"Sequences must be longer than the {recipe.sinks} sinks of {recipe.name}; give longer ones."
            )
    own = own_layers(text_config(model))
    fits = {
        layer_info.layer: fits_for(layer_info, chosen, getattr(own[layer_info.layer], "sliding_window", None))
        for layer_info in info.attention
    }
    _two_passes(model, info, data, list(fits.values()), dense=backend == DENSE, group=group, on_batch=on_batch)
    counts = torch.tensor(
        [sum(batch.shape[0] for batch in data), sum(batch.numel() for batch in data)], dtype=torch.int64, device="cpu"
    )
    sequences, tokens = (reduced(counts, "SUM", group) if group else counts).tolist()
    provenance = {"narrowkv": __version__, "sequences": sequences, "tokens": tokens}
    _warn_where_few_dominate(fits)
    fingerprint, calibrations = Fingerprint.of(model), []
    shapes = {layer: fitted.shape for layer, fitted in fits.items()}
    for recipe in chosen:
        with undisturbed():
            learned = learn(recipe, fits)
        recorded = provenance | ({"allocation": learned.report} if learned.report else {})
        _warn_of_absurd_loss(learned, model)
        calibrations.append(Calibration(learned.recipe, fingerprint, learned.layers, dict(shapes), recorded))
    return calibrations


def counted(on_step: Callable[[int, int], None] | None, total: int) -> Callable[..., None]:
    """A function to call after each step; it passes the steps done and `total` to on_step, if given."""
    done = itertools.count(1)

    def step(*_: int) -> None:
        if on_step:
            on_step(next(done), total)

    return step


def _two_passes(
    model: PreTrainedModel,
    info: ModelInfo,
    data: Sequence[Tensor],
    fits: Sequence[LayerFits],
    *,
    dense: bool,
    group: Group,
    on_batch: Callable[[int, int], None] | None,
) -> None:
    """Show what each layer stores to its fits: first for the ranges, then, with gradients, for the codebooks."""
    report = counted(on_batch, 2 * len(data))
    passes = (
        (lambda layer, *elements: fits[layer].observe_range(*elements), False, LayerFits.merge_ranges),
        (lambda layer, *elements: fits[layer].observe_codebook(*elements), True, LayerFits.merge_codebooks),
    )
    for observer, gradients, merge in passes:
        drawn = gradients and any(layer.needs_drawn for layer in fits)
        observe_layers(model, info, data, observer, gradients=gradients, drawn=drawn, dense=dense, on_batch=report)
        for layer in fits if gradients else ():
            layer.require_gradients()
        for layer in fits if group is not None else ():
            merge(layer, group)


def calibrate(
    model: PreTrainedModel,
    batches: Any,
    recipe: Recipe | str,
    *,
    backend: str = AUTO,
    group: Group = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Learn a recipe's tables from a model and token ids, in two passes over them.

    Parameters, warnings and errors are those of `calibrate_many`. Returns the Calibration, to be passed to `PackedCache` or
    saved (`save_pretrained`).
    """
    return calibrate_many(model, batches, [recipe], backend=backend, group=group, on_batch=on_batch)[0]


def _warn_where_few_dominate(fits: Mapping[int, LayerFits]) -> None:
    """Warn if a hundredth of the tokens has more than half of the Fisher information of many tensors, or nearly all."""
    shares = {(layer, side): share for layer, fit in fits.items() for side, share in fit.dominated().items()}
    dominated = {tensor: share for tensor, share in shares.items() if share > MOST_OF_FEW}
    if dominated and (len(dominated) > len(shares) / 4 or max(dominated.values()) > ALL_OF_FEW):
        (layer, side), share = max(dominated.items(), key=lambda item: item[1])
        warnings.warn(
            f"One token in a hundred has more than half of what the tables of {len(dominated)} of {len(shares)} tensors are "
            f"learned from ({share:.0%} for the {side} of layer {layer}), so they may fit other text badly; check that texts "
            "begin as the model expects (--bos, --no-bos), give more text, or more of its kinds.",
            NarrowKVWarning,
            stacklevel=4,
        )


def _warn_of_absurd_loss(learned: Learned, model: PreTrainedModel) -> None:
    """Warn where a recipe is predicted to lose more than a model that knows nothing has to lose."""
    guessing = math.log(getattr(text_config(model), "vocab_size", math.inf))
    loss = learned.report.get("predicted_loss", 0.0)
    if not loss <= guessing:
        warnings.warn(
            f"{learned.recipe.name} is predicted to lose {loss:.3g} nats for each token, where blind guessing loses "
            f"{guessing:.3g}: the choice of widths cannot be trusted; check that texts begin as the model expects (--bos, "
            "--no-bos), or allow more bits.",
            NarrowKVWarning,
            stacklevel=4,
        )


def _run(model: PreTrainedModel, cache: ObserverCache, batch: Tensor, *, gradients: bool, drawn: bool) -> None:
    """One forward pass, and a backward pass of the summed loss if `gradients`; drawn: another one on drawn tokens."""
    with torch.set_grad_enabled(gradients):
        ids = batch.to(model.device).clone()  # an ordinary tensor, wherever the batch was made
        last = {} if gradients or KEEP not in inspect.signature(type(model).forward).parameters else {KEEP: 1}
        logits = model(ids, **{CACHE: cache}, use_cache=True, **last).logits
        if not torch.isfinite(logits[:, -1]).all():
            raise ActivationError("The model computes NaN or infinity on the calibration text; check its weights and dtype.")
        if gradients and logits.requires_grad:  # else no listener learns a gradient, and says so
            with undisturbed(gradients=True):  # listeners learn within
                _backward(logits, ids, drawn)


def _backward(logits: Tensor, ids: Tensor, drawn: bool) -> None:
    """Go backwards from the summed cross entropy of a text; drawn: and from that of tokens drawn after each of its own.

    Its gradient by the logits is the softmax less one at the target. That is written out here, in one tensor, since logits
    are most of what calibration holds.
    """
    predicted = logits.detach().float().softmax(-1)  # [batch, tokens, vocabulary]
    draws = [draw_tokens(row, text) for row, text in zip(predicted, ids, strict=True)] if drawn else []
    last = predicted[:, -1].clone()
    one = torch.ones((), dtype=torch.float32, device=logits.device).expand(*ids.shape, 1)
    following = ids.roll(-1, 1)[..., None]
    predicted.scatter_add_(-1, following, -one)
    predicted[:, -1] = 0  # nothing follows the text
    logits.backward(predicted.to(logits.dtype), retain_graph=drawn)
    if drawn:
        predicted.scatter_add_(-1, following, one)
        predicted[:, -1] = last
        predicted.scatter_add_(-1, torch.stack(draws)[..., None], -one)
        logits.backward(predicted.to(logits.dtype))


@torch.no_grad()
def draw_tokens(predicted: Tensor, ids: Tensor) -> Tensor:
    """A token after each one of a sequence, drawn from what the model predicts there: [tokens] int64.

    predicted: probabilities [tokens, vocabulary]. ids: [tokens] int64, from which the seed is made, so that the tokens drawn
    depend neither on the order of sequences nor on how they are batched.
    """
    weights = torch.arange(1, len(ids) + 1, dtype=torch.int64, device=ids.device)
    generator = torch.Generator(predicted.device).manual_seed(int((ids * weights).sum()))
    uniform = torch.rand(len(ids), 1, dtype=torch.float32, device=predicted.device, generator=generator)
    found = []
    for rows, levels in zip(predicted.split(DRAWN_TOGETHER), uniform.split(DRAWN_TOGETHER), strict=True):
        cumulative = rows.cumsum(-1)  # torch.multinomial takes six times as long
        found.append(torch.searchsorted(cumulative, levels * cumulative[:, -1:], right=True)[:, 0])
    return torch.cat(found).clamp(max=predicted.shape[-1] - 1)
