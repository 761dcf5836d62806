"""The quantizers of all layers; for recipes that leave schemes open, the choice of them under a budget for the whole cache."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from narrowkv.calibration.allocation import Option, allocate
from narrowkv.calibration.layer_fits import LayerFits
from narrowkv.calibration.rates import mean_counted_tokens
from narrowkv.calibration.shares import allocate_budgets
from narrowkv.codec import AnyQuantizer
from narrowkv.codec.scheme_parts import BLOCK
from narrowkv.errors import RecipeError
from narrowkv.methods import LayerSchemes, Recipe

POSITION_BITS = 32  # of each token, for keys that are rotated when read
SINK_BITS = 32  # of each element of a sink, in the widest dtype of a model that is served
SLOT_BITS = 64 / BLOCK  # of each token in each layer: where its block lies


@dataclass(frozen=True)
class Learned:
    """Quantizers of all layers; recipe: with the schemes of each layer where they were chosen; report: plain data on that."""

    recipe: Recipe
    layers: dict[int, tuple[AnyQuantizer, AnyQuantizer]]
    report: dict[str, Any]


def learn(recipe: Recipe, layers: Mapping[int, LayerFits]) -> Learned:
    """Finish one recipe. Raises RecipeError where its budget is too small."""
    recipe, report = _choose(recipe, layers) if recipe.search_space else (recipe, {})
    finished: dict[int, tuple[AnyQuantizer, AnyQuantizer]] = {}
    for layer, fits in layers.items():
        pair = recipe.schemes(layer)
        keys, values = fits.quantizer(pair.keys, True, recipe.sinks), fits.quantizer(pair.values, False, recipe.sinks)
        finished[layer] = (keys, values)
    return Learned(recipe, finished, report)


def overhead_bits(layers: Collection[tuple[int, int]], sinks: int) -> float:
    """Bits that no choice of schemes changes, for each element that is stored at 32,768 tokens.

    layers: of each, the tokens that it stores and the elements of a token, keys or values. sinks: tokens stored exactly.
    """
    positions = POSITION_BITS * max(tokens for tokens, _ in layers)
    others = sum(SLOT_BITS * tokens + SINK_BITS * sinks * 2 * elements for tokens, elements in layers)
    return (positions + others) / sum(2 * tokens * elements for tokens, elements in layers)


def _choose(recipe: Recipe, layers: Mapping[int, LayerFits]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with a scheme for each layer, and what that is predicted to take and to cost."""
    assert recipe.search_space
    elements = sum(2 * fits.elements for fits in layers.values())
    overhead = overhead_bits(_stored_elements(layers), recipe.sinks)
    try:
        options = (_options_by_rate if recipe.search_space.by_rate else _options)(recipe, layers, elements, overhead)
    except RecipeError as error:
        raise RecipeError(f"Recipe {recipe.name}: {error}") from error
    pairs = dict(zip(layers, zip(options[::2], options[1::2], strict=True), strict=True))
    chosen = {layer: LayerSchemes(keys.scheme, values.scheme) for layer, (keys, values) in pairs.items()}
    report: dict[str, Any] = {
        "budget": sum(recipe.search_space.budgets) / 2,
        "bits": _bits(options, list(layers.values()), overhead),
        "predicted_loss": sum(option.cost for option in options),
        "layers": {
            str(layer): {
                side: {"bits": option.bits / layers[layer].elements, "predicted_loss": option.cost}
                for side, option in zip(("keys", "values"), pair, strict=True)
            }
            for layer, pair in pairs.items()
        },
    }
    if recipe.search_space.value_budget is not None:
        report["sides"] = {
            side: {"budget": budget, "bits": _bits(options[i::2], list(layers.values()), overhead)}
            for i, (side, budget) in enumerate(zip(("keys", "values"), recipe.search_space.budgets, strict=True))
        }
    if recipe.search_space.equal_layers:
        report["stream_bytes"] = {str(layer): _stream_bytes(pair, layers[layer].shape) for layer, pair in chosen.items()}
    return replace(recipe, layers=chosen, search_space=None), report


def _bits(options: Sequence[Option], layers: Sequence[LayerFits], overhead: float) -> float:
    """What some tensors of each layer take for each element that they store at 32,768 tokens, tables as if alike in all."""
    every = [fits for fits in layers for _ in range(len(options) // len(layers))]
    stored = sum(option.bits * fits.counted_tokens for option, fits in zip(options, every, strict=True))
    return stored / sum(fits.elements * fits.counted_tokens for fits in every) + overhead


def _stream_bytes(pair: LayerSchemes, shape: tuple[int, int]) -> int:
    """Bytes of a token's streams, keys and values, in one layer of a shape: kv_heads, head_dim."""
    heads, dim = shape
    return heads * (pair.keys.codes(dim) + pair.values.codes(dim))


def _options(recipe: Recipe, layers: Mapping[int, LayerFits], elements: int, overhead: float) -> list[Option]:
    """One of the schemes for the keys, then for the values, of each layer."""
    assert recipe.search_space
    menus, tokens = [], mean_counted_tokens(_stored_elements(layers))
    for fits in layers.values():
        for schemes, keys in ((recipe.search_space.keys, True), (recipe.search_space.values, False)):
            menus.append(fits.menu(schemes, keys, recipe.sinks, tokens))
    picks = allocate(menus, recipe.search_space.budget, elements, overhead)
    return [menu[pick] for menu, pick in zip(menus, picks, strict=True)]


def _stored_elements(layers: Mapping[int, LayerFits]) -> list[tuple[int, int]]:
    return [(fits.counted_tokens, fits.elements) for fits in layers.values()]


def _options_by_rate(recipe: Recipe, layers: Mapping[int, LayerFits], elements: int, overhead: float) -> list[Option]:
    """The same where rates are to be allocated."""
    assert recipe.search_space
    sides, menus, tokens = [], [], mean_counted_tokens(_stored_elements(layers))
    for fits in layers.values():
        for schemes, keys in ((recipe.search_space.keys, True), (recipe.search_space.values, False)):
            menus.append(fits.rate_menu(schemes, keys, recipe.sinks, tokens))
            sides.append((fits, keys))
    chosen = allocate_budgets(recipe.search_space, menus, overhead)
    return [fits.measured(scheme, keys, recipe.sinks, tokens) for scheme, (fits, keys) in zip(chosen, sides, strict=True)]
