"""Caches and calibrations of every stored form, as files that are to be forged."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv import Calibration, Outliers, PackedCache, Quantization, Recipe, Scheme, calibrate, get_recipe
from narrowkv.calibration.calibration import FILE
from tests.conftest import make_tiny
from tests.families import make

RECIPES = [
    *("fp16", "int4", "int8", "nf3", "int3-head", "kivi-2-g16-r40", "kivi-4-g8-r20", "fp4-g16", "nvfp4", "fp8"),
    *("hadamard-int4", "intrinsic-2", "intrinsic-2-nearest-kmeans", "intrinsic-2-w3", "smooth-int8", "nuq3-1%"),
    *(
        "nuq2-1%-qnorm",
        "nuq4-postrope",
        "nuq3.5",
        "narrow2.5",
        "narrow3",
    ),
    *("window and sinks", "by matrix", "capped"),
]
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "wide": {"heads": 2, "kv_heads": 1, "head_dim": 64, "dtype": torch.bfloat16},  # which compiled code reads in its own ways
    "sliding": {"family": "mistral", "sliding_window": 24},
    "biased": {"family": "qwen2"},  # of which a bias is taken out before keys and values are quantized
    "angles": {},  # stored with each token, since frequencies change with the length
}
# how caches came to be: sequences, tokens, padding of the first one, and what follows the prompt
STATES = {
    "tail": (1, 10, 0, None),
    "block": (1, 64, 0, None),
    "padded": (2, 150, 5, None),
    "beams": (2, 134, 0, lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0]))),
    "cropped": (1, 150, 0, lambda cache: cache.crop(-13)),
}
FEW = ("int4", "nuq3-1%", "narrow3", "fp16", "kivi-2-g16-r40")  # which are stored in every state


@dataclass(frozen=True)
class Entry:
    """One file. kind: `cache` or `calibration`."""

    name: str
    kind: str
    model: str
    recipe: str
    path: Path

    def content(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors."""
        with safe_open(self.path, framework="pt") as file:
            return json.loads(file.metadata()["narrowkv"]), load_file(self.path)


@cache
def model_of(name: str) -> PreTrainedModel:
    """A model of one layer, or two."""
    if name == "angles":
        return make("llama, dynamic")
    model = make_tiny(layers=1, **MODELS[name])
    for part, bias in model.named_parameters():
        if part.endswith("bias"):
            torch.nn.init.normal_(bias, std=3.0)
    return model


def recipe_of(name: str) -> Recipe:
    """A recipe by name, or one of those that have none."""
    if name == "window and sinks":
        return get_recipe("nuq3-1%").with_options(residual_length=20, sinks=3)
    if name == "by matrix":
        scheme = Scheme(Quantization(3, "nuq", strategy="channel"), outliers=Outliers(0.01, scope="matrix"))
        return Recipe(name, scheme, Scheme(Quantization(3, "nuq"), outliers=Outliers(0.01, scope="matrix")))
    if name == "capped":
        scheme = Scheme(Quantization(4, "int", strategy="token_head"), outliers=Outliers(0.02, cap=1))
        return Recipe(name, scheme, scheme, sinks=1)
    return get_recipe(name)


def source_of(folder: Path, model: str, recipe: str) -> Calibration | Recipe:
    """What caches of a recipe are made from; calibrated when the corpus was built."""
    made = recipe_of(recipe)
    return Calibration.from_pretrained(folder / model / recipe) if made.needs_calibration else made


def build(folder: Path) -> None:
    """Fill a folder with the corpus."""
    torch.manual_seed(0)
    for model in MODELS:
        for recipe in RECIPES if model in ("tiny", "wide") else FEW:
            if recipe_of(recipe).needs_calibration:
                ids = torch.randint(2, 97, (2, 80))
                with warnings.catch_warnings():  # nothing good can be learned from random elements
                    warnings.simplefilter("ignore")
                    calibrate(model_of(model), ids, recipe_of(recipe)).save_pretrained(folder / model / recipe)
            for state in STATES if recipe in FEW and model != "wide" else ("padded",):
                read_prompt(model_of(model), source_of(folder, model, recipe), *STATES[state]).save(
                    folder / model / recipe / f"{state}.cache"
                )


def read_prompt(
    model: PreTrainedModel, source: Calibration | Recipe, batch: int, tokens: int, padded: int, then
) -> PackedCache:
    made, ids = PackedCache(model, source), torch.randint(2, 97, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask if padded else None, past_key_values=made)
    if then is not None:
        then(made)
    return made


def entries(folder: Path) -> Iterator[Entry]:
    """All files, in the same order always."""
    for path in sorted(folder.glob("*/*/*")):
        model, recipe, file = path.relative_to(folder).parts
        yield Entry(f"{model}, {recipe}, {path.stem}", "calibration" if file == FILE else "cache", model, recipe, path)
