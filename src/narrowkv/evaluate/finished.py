"""Finished calibrations that are given for recipes, so that nothing is learned twice."""

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from narrowkv.calibration import Calibration, Fingerprint
from narrowkv.codec import Scheme
from narrowkv.errors import CalibrationError, RecipeError, TextError
from narrowkv.files import checksum
from narrowkv.methods import Recipe, get_recipe


def finished_for(
    model: PreTrainedModel, recipes: Sequence[Recipe], calibrations: Sequence[Calibration]
) -> dict[str, Calibration]:
    """The calibration of each recipe that one is given for, by the recipe's name.

    Raises CalibrationError where one belongs to another model, to none of these recipes, or to the same recipe as another.
    """
    found: dict[str, Calibration] = {}
    fingerprint = Fingerprint.of(model) if calibrations else None
    for calibration in calibrations:
        name = calibration.recipe.name
        if name in found:
            raise CalibrationError(f"Two calibrations are given for recipe {name}; give one for each recipe.")
        wanted = next((recipe for recipe in recipes if recipe.name == name), None)
        if wanted is None:
            raise CalibrationError(
                f"A calibration is given for recipe {name}, which is not among those requested "
                f"({', '.join(recipe.name for recipe in recipes) or 'none'}); request it too, or leave its calibration out."
            )
        if not implements(calibration.recipe, wanted):
            raise CalibrationError(f"The calibration given for {name} is of another recipe of that name; calibrate again.")
        assert fingerprint is not None
        calibration.fingerprint.check(fingerprint)
        found[name] = calibration
    return found


def recipe_of(calibration: Calibration) -> Recipe:
    """The recipe that was requested when a calibration was made: the named one, if it is that."""
    try:
        named = get_recipe(calibration.recipe.name)
    except RecipeError:
        return calibration.recipe
    return named if implements(calibration.recipe, named) else calibration.recipe


def implements(learned: Recipe, wanted: Recipe) -> bool:
    """Whether a calibration's recipe implements the requested one, whatever its name and its choice in a search space."""
    if wanted.search_space is None:
        return replace(learned, name=wanted.name) == wanted
    chosen = learned.layers.values() if learned.search_space is None else ()
    return replace(learned, name=wanted.name, layers=wanted.layers, search_space=wanted.search_space) == wanted and all(
        _without_rates(pair.keys, wanted.keys) in wanted.search_space.keys
        and _without_rates(pair.values, wanted.values) in wanted.search_space.values
        for pair in chosen
    )


def tables_checksum(calibration: Calibration) -> str:
    """A checksum of all that was learned, by which rows of other tables of the same recipe are distinguished."""
    parts = [
        checksum(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for layer, pair in sorted(calibration.layers.items())
        for quantizer in pair
        for _, tensor in sorted(quantizer.tensors().items())
    ]
    return checksum(" ".join([json.dumps(calibration.recipe.settings(), sort_keys=True), *parts]).encode())


def require_text(learning: Sequence[Recipe], learn_from: object) -> None:
    """Raise TextError where recipes are to learn and there is no text."""
    if learning and not learn_from:
        raise TextError(
            f"Recipe {learning[0].name} learns its tables from a text; give one with --calibration-text FILE, or tables that "
            "are finished with --calibration FOLDER."
        )


def _without_rates(scheme: Scheme, wanted: Scheme) -> Scheme:
    """A scheme as it was before calibration allocated its rates, if that is what was requested."""
    return scheme if scheme.quantization.counts is None else scheme.with_settings(counts=None, bits=wanted.bits)
