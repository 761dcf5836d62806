"""`narrowkv calibrate`: learn a recipe's tables from a model and a text."""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from narrowkv.cli.common import (
    DEFAULT_RECIPE,
    BackendOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    RecipeOption,
    SamplesOption,
    WindowOption,
    default_text,
    learn,
    out,
)
from narrowkv.errors import TextError
from narrowkv.integrations import load_model
from narrowkv.methods import get_recipe


def calibrate(
    model: ModelArgument,
    target: Annotated[Path, typer.Option("--out", help="Folder to write the calibration to.")],
    recipe: RecipeOption = None,
    text: Annotated[str | None, typer.Option(help="A text file or a data set's name.")] = None,
    window: WindowOption = 2048,
    samples: SamplesOption = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = "torch",
) -> None:
    """Learn a recipe's codebooks, ranges and thresholds for a model, and save them. Processes of torchrun share the text."""
    chosen = get_recipe(recipe or DEFAULT_RECIPE)
    source = default_text(model, text, "narrowkv://train")
    if source is None:
        raise TextError("Calibration needs a text; give one with --text FILE.")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # under torchrun each process has a GPU of its own
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    loaded, tokenizer = load_model(model, dtype, device)
    calibration = learn(loaded, tokenizer, [chosen], source, window, samples, backend)[0]
    if int(os.environ.get("RANK", "0")):  # under torchrun the first process writes
        return
    calibration.save_pretrained(target)
    seen = calibration.provenance
    out.print(
        f"{chosen.name} learned from {seen['tokens']:,} tokens in {seen['sequences']} sequences, saved in {target}.",
        markup=False,
    )
