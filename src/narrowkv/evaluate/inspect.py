"""What is quantized: how large keys and values are by channel, token and layer, and how the loss depends on them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.attention import AUTO
from narrowkv.calibration.layer_fits import NO_GRADIENT, FitKey, LayerFits, with_gradient
from narrowkv.calibration.statistics import Quantiles
from narrowkv.codec import Quantizer
from narrowkv.defaults import DENSE, INSPECTED
from narrowkv.errors import CalibrationError, RecipeError, TextError, UnsupportedModelError
from narrowkv.evaluate.results import ResultFile
from narrowkv.integrations.calibrator import counted, fits_for, observe_layers
from narrowkv.integrations.preparation import model_info_for
from narrowkv.integrations.probe import AttentionLayerInfo
from narrowkv.methods import Recipe, get_recipe

KIND = "inspect"
TENSORS = ("keys", "rotated", "values")  # before and after the rotary embedding
FRACTIONS = {"t99": 0.99, "t99.9": 0.999, "t99.99": 0.9999, "t100": 1.0}
HEAT_CHANNELS, HEAT_TOKENS = 128, 64  # cells of a heat map
BINS = 128  # parts into which channels and tokens are cut where outliers are counted
BINS = 64  # of a distribution
FULLEST = 0.1  # of the channels, or tokens, whose share of the outliers is reported


class _Tensor:
    """What is gathered of one tensor of one layer, in two passes; its first token, which is a sink, is stored apart."""

    def __init__(self) -> None:
        self.magnitudes = Quantiles()
        self.first = self.gradient = 0.0
        self.count = 0
        self.heat: Tensor | None = None
        self.channels = self.tokens = torch.zeros(0, dtype=torch.float32, device="cpu")

    def observe_range(self, x: Tensor) -> None:
        """First pass: x [batch, kv_heads, tokens, head_dim]."""
        size = x.detach().float().abs()
        if self.heat is None:
            self.heat = size[0].transpose(1, 2).flatten(0, 1)  # [channels, tokens]
            self.channels, self.tokens = (size.new_zeros(count, dtype=torch.float64) for count in self.heat.shape)
        self.first = max(self.first, size[:, :, 0].max().item())
        self.magnitudes.add(size[:, :, 1:].flatten()[:, None])

    def largest(self, fraction: float) -> float:
        """The magnitude that this many of the elements do not exceed."""
        return self.magnitudes.quantile(fraction).item()

    def observe_gradient(self, x: Tensor, threshold: float) -> None:
        """Second pass: where the elements beyond the threshold are, and the gradient once it is known."""
        beyond = x.detach().abs() > threshold
        self.channels += beyond.sum((0, 2)).flatten()
        self.tokens += torch.nn.functional.pad(beyond.sum((0, 1, 3)), (0, len(self.tokens) - x.shape[2]))
        with_gradient(x, self._add_gradient)

    def _add_gradient(self, gradient: Tensor) -> None:
        squared = gradient[:, :, 1:].double().square()
        self.gradient += squared.sum().item()
        self.count += squared.numel()


def inspect(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    results: ResultFile,
    layer: int | None = None,
    recipe: Recipe | str = INSPECTED,
    *,
    backend: str = AUTO,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Look at what a model stores, and add what is found to a file of results, unless it is there.

    batches: token ids [batch, tokens] int64, all of one length. layer: whose heat maps and distributions are wanted, the
    middle one by default. recipe: whose codebook is drawn over the distributions. on_step: called with (batches done, batches
    in both passes). The rows, by `what`:

    - `layer`, of each layer and tensor: magnitudes t99 to t100 (this many percent of the elements are no larger),
    `first_token`
      (the largest magnitude of the first token, which the others leave out), `fisher` (mean squared gradient of the window's
      summed loss by one element; KVQuant, section 3.3);
    - `outliers`, of the chosen layer: shares of the elements beyond t99, by parts of the channels and of the tokens, and the
      share of them in the fullest tenth of channels, or tokens;
    - `heat map`, of the chosen layer: mean magnitudes of the first sequence, [channels, tokens] in at most 128 x 64 cells;
    - `distribution`, of the chosen layer's keys and values, normalized: densities in 64 bins over [-1, 1] of the elements
      and of their Fisher weights, and the codebook.

    Raises TextError without text, UnsupportedModelError where the layer has no keys of its own, RecipeError where the recipe
    has no codebook of a layer, and what `calibrate` raises.
    """
    chosen = get_recipe(recipe)
    if not len(batches) or any(batch.shape != batches[0].shape or batch.shape[1] < 3 for batch in batches):
        raise TextError("There is nothing to look at; give sequences of one length of 3 tokens or more.")
    info = model_info_for(model, backend, [chosen])
    layer_info = _layer(info.attention, layer)
    if any(row["what"] == "distribution" and row["tensor"] == "values" for row in results.rows):
        return  # the last row is there, so all are
    schemes = chosen.schemes(layer_info.layer)
    if any(scheme.datatype != "nuq" for scheme in (schemes.keys, schemes.values)):
        raise RecipeError(f"Recipe {chosen.name} learns no codebook that a layer shares; choose one such as {INSPECTED}.")
    fits = fits_for(layer_info, [chosen])
    seen = [{name: _Tensor() for name in TENSORS if name != "rotated" or one.rope} for one in info.attention]
    thresholds: list[dict[str, float]] = []
    step = counted(on_step, 2 * len(batches))

    def first_pass(layer: int, *elements: Any) -> None:
        for name, x in zip(TENSORS, elements, strict=False):
            if name in seen[layer]:
                seen[layer][name].observe_range(x)
        if info.attention[layer] is layer_info:
            fits.observe_range(*elements)

    def second_pass(layer: int, *elements: Any) -> None:
        for name, x in zip(TENSORS, elements, strict=False):
            if name in seen[layer]:
                seen[layer][name].observe_gradient(x, thresholds[layer][name])
        if info.attention[layer] is layer_info:
            fits.observe_codebook(*elements)

    observe_layers(model, info, batches, first_pass, dense=backend == DENSE, on_batch=step)
    thresholds += [{name: tensor.largest(FRACTIONS["t99"]) for name, tensor in layer.items()} for layer in seen]
    observe_layers(model, info, batches, second_pass, gradients=True, dense=backend == DENSE, on_batch=step)
    if any(not tensor.count for of_layer in seen for tensor in of_layer.values()):
        raise CalibrationError(NO_GRADIENT)
    rows = []
    for one, of_layer in zip(info.attention, seen, strict=True):
        rows += [_layer_row(one.layer, *item) for item in of_layer.items()]
    tensors = seen[info.attention.index(layer_info)]
    rows += [_outliers_row(layer_info.layer, *item) for item in tensors.items()]
    rows += [_heat_row(layer_info.layer, *item) for item in tensors.items()]
    rows += [_distribution_row(layer_info, fits, chosen, keys) for keys in (True, False)]
    for row in rows:
        if results.find(what=row["what"], layer=row["layer"], tensor=row["tensor"]) is None:
            results.add(row)


def _layer(attention: Sequence[AttentionLayerInfo], layer: int | None) -> AttentionLayerInfo:
    if layer is None:
        return attention[len(attention) // 2]
    for layer_info in attention:
        if layer_info.layer == layer:
            return layer_info
    raise UnsupportedModelError(
        f"Layer {layer} keeps no keys and values of its own; choose one of "
        f"{', '.join(str(layer_info.layer) for layer_info in attention)}."
    )


def _layer_row(layer: int, name: str, tensor: _Tensor) -> dict[str, Any]:
    ranges = {label: _short(tensor.largest(fraction)) for label, fraction in FRACTIONS.items()}
    summary = {"first_token": _short(tensor.first), "fisher": _short(tensor.gradient / tensor.count)}
    return {"what": "layer", "layer": layer, "tensor": name, **ranges, **summary}


def _outliers_row(layer: int, name: str, tensor: _Tensor) -> dict[str, Any]:
    channels, tokens = len(tensor.channels), len(tensor.tokens)
    sequences = tensor.count / (channels * (tokens - 1))
    return {
        "what": "outliers",
        "layer": layer,
        "tensor": name,
        "beyond": _short(tensor.largest(FRACTIONS["t99"])),
        "channels": channels,
        "tokens": tokens,
        "by_channel": _plain(_means(tensor.channels / (tokens * sequences), BINS)),
        "by_token": _plain(_means(tensor.tokens / (channels * sequences), BINS)),
        "in_fullest_channels": _short(_in_fullest(tensor.channels)),
        "in_fullest_tokens": _short(_in_fullest(tensor.tokens)),
    }


def _heat_row(layer: int, name: str, tensor: _Tensor) -> dict[str, Any]:
    assert tensor.heat is not None
    channels, tokens = tensor.heat.shape
    cells = _means(_means(tensor.heat, HEAT_TOKENS).T, HEAT_CHANNELS).T
    summary = {"channels": channels, "tokens": tokens, "magnitude": [_plain(row) for row in cells]}
    return {"what": "heat map", "layer": layer, "tensor": name, **summary}


def _distribution_row(layer_info: AttentionLayerInfo, fits: LayerFits, recipe: Recipe, keys: bool) -> dict[str, Any]:
    pair = recipe.schemes(layer_info.layer)
    scheme = pair.keys if keys else pair.values
    fit, quantizer = fits.fits[FitKey.of(scheme, keys, recipe.sinks)], fits.quantizer(scheme, keys, recipe.sinks)
    assert isinstance(quantizer, Quantizer) and quantizer.codebook is not None
    histogram = fit.histogram  # type: ignore[union-attr]
    return {
        "what": "distribution",
        "layer": layer_info.layer,
        "tensor": ("keys" if scheme.transform.pre_rope or layer_info.rope is None else "rotated") if keys else "values",
        "bits": scheme.bits,
        "density": _plain(_density(histogram.count)),
        "weight": _plain(_density(histogram.weight)),
        "codebook": _plain(quantizer.codebook),
    }


def _means(x: Tensor, parts: int) -> Tensor:
    """x [..., n] with its last dimension cut into at most this many parts, almost equal, and the mean of each."""
    chunks = x.tensor_split(min(parts, x.shape[-1]), dim=-1)
    return torch.stack([chunk.mean(-1) for chunk in chunks], -1)


def _in_fullest(counts: Tensor) -> float:
    """The share of the total count in the fullest tenth of the entries."""
    fullest = counts.sort(descending=True).values[: max(round(FULLEST * len(counts)), 1)]
    return (fullest.sum() / counts.sum().clamp(min=1)).item()


def _density(mass: Tensor) -> Tensor:
    """Mass [bins] over [-1, 1] as a density in fewer bins; all 0 where there is none."""
    share = mass.view(BINS, -1).sum(1)
    return share / share.sum().clamp(min=torch.finfo(torch.float64).tiny) * (BINS / 2)


def _plain(elements: Tensor) -> list[float]:
    return [_short(number) for number in elements.tolist()]


def _short(number: float) -> float:
    """Six digits, which no plot needs more of."""
    return float(f"{number:.6g}")
