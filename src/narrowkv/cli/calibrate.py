"""`narrowkv calibrate`: learn a recipe's tables from a model and a text."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from narrowkv.cli.common import learn_windows, load_model, note_mix, out, progress, texts_to_learn, windows_to_learn
from narrowkv.cli.options import (
    BackendOption,
    BosOption,
    DeviceOption,
    DtypeOption,
    LearnedSamplesOption,
    LearnedTextOption,
    LearnedWindowOption,
    ModelArgument,
    RecipeOption,
    folder_to_write,
)
from narrowkv.defaults import AUTO, RECIPE
from narrowkv.errors import RecipeError, TextError

if TYPE_CHECKING:
    from torch import Tensor

    from narrowkv.calibration import Calibration
    from narrowkv.methods import Recipe


def calibrate(
    model: ModelArgument,
    target: Annotated[
        Path,
        typer.Option("--out", parser=folder_to_write, metavar="FOLDER", help="Folder to write the calibration to."),
    ],
    recipe: RecipeOption = None,
    bits: Annotated[
        float | None,
        typer.Option(help="Budget in bits per element at 32K tokens, everything counted; calibration allocates it to layers."),
    ] = None,
    key_bits: Annotated[float | None, typer.Option(help="Like --bits for the keys only; requires --value-bits.")] = None,
    value_bits: Annotated[float | None, typer.Option(help="Like --bits for the values only; requires --key-bits.")] = None,
    equal_layers: Annotated[
        bool,
        typer.Option(
            "--equal-layers", help="Use the same number of bytes per token in all layers, for pages of one size (narrow only)."
        ),
    ] = False,
    check: Annotated[int, typer.Option(min=0, help="Measure the loss of each choice on this many further windows.")] = 0,
    text: LearnedTextOption = None,
    window: LearnedWindowOption = None,
    samples: LearnedSamplesOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
    bos: BosOption = None,
) -> None:
    """Learn a recipe's codebooks, ranges and thresholds for a model, and save them. Processes of torchrun share the text."""
    import torch

    from narrowkv.evaluate.sources import read_texts
    from narrowkv.evaluate.windows import cut_apart
    from narrowkv.methods import narrow

    chosen = chosen_recipe(recipe, bits, key_bits, value_bits)
    if equal_layers:
        chosen = narrow.with_equal_layers(chosen)
    first = not int(os.environ.get("RANK", "0"))  # under torchrun the first process speaks and writes
    sources = texts_to_learn(model, text)
    window, samples = windows_to_learn(sources, window, samples)
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # under torchrun each process has a GPU of its own
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    words = read_texts(sources)
    loaded, tokenizer = load_model(model, dtype, device)
    note_mix(model, text, first)
    windows, unseen = cut_apart(tokenizer, words, window, samples, check, bos=bos)
    if check and not len(unseen):
        raise TextError(f"The text ends with the calibration's {len(windows)} windows; give more text, or fewer --samples.")
    calibration = learn_windows(loaded, [chosen], windows, backend)[0]
    if not first:
        return
    if "allocation" in calibration.provenance:
        found = {} if not check else measure_parts(loaded, calibration, unseen)
        out.print(allocation_table(calibration, found))
    calibration.save_pretrained(target)
    seen = calibration.provenance
    out.print(
        f"{chosen.name} learned from {seen['tokens']:,} tokens in {seen['sequences']} sequences, saved in {target}.",
        markup=False,
    )


def chosen_recipe(recipe: str | None, bits: float | None, key_bits: float | None, value_bits: float | None) -> "Recipe":
    """The recipe that options specify; raises RecipeError if they specify several, or only a part of one."""
    from narrowkv.methods import get_recipe, narrow

    if (key_bits is None) != (value_bits is None):
        raise RecipeError("--key-bits and --value-bits go together; give both, or --bits for one budget of keys and values.")
    if (recipe is not None) + (bits is not None) + (key_bits is not None) > 1:
        raise RecipeError("--bits and --key-bits make recipes of their own; give either --bits or --recipe or --key-bits.")
    if key_bits is not None:
        return narrow.of_budget(key_bits, value_bits=value_bits)
    return get_recipe(recipe or RECIPE) if bits is None else narrow.of_budget(bits)


def measure_parts(model: Any, calibration: "Calibration", windows: "Tensor") -> dict[tuple[int, str], float]:
    """The measured loss of each choice, which is also written to the calibration's provenance."""
    from narrowkv.evaluate.sensitivity import part_losses

    with progress("checking") as advance:
        found = part_losses(model, calibration, windows, on_step=advance)
    for (layer, side), loss in found.items():
        calibration.provenance["allocation"]["layers"][str(layer)][side]["found_loss"] = loss
    return found


def allocation_table(calibration: "Calibration", found: dict[tuple[int, str], float]) -> Table:
    """The bits of each layer, with the predicted and the measured loss."""
    allocation = calibration.provenance["allocation"]
    sides = allocation.get("sides", {"keys and values": allocation})
    each = sorted(set(allocation.get("stream_bytes", {}).values()))
    equal = f"; {', '.join(map(str, each))} bytes of a token in every layer" if each else ""
    used = ", ".join(f"{side} {part['bits']:.3f} of {part['budget']:g} bits" for side, part in sides.items())
    table = Table(title=f"{used}{equal}; loss in nats for each token", title_justify="left")
    for side in ("keys", "values"):
        table.add_column("layer" if side == "keys" else "", justify="right")
        for heading in (f"{side}, bits", "predicted", *(["found"] if found else [])):
            table.add_column(heading, justify="right")
    for layer, sides in allocation["layers"].items():
        cells = []
        for side in ("keys", "values"):
            cells += [layer if side == "keys" else "", f"{sides[side]['bits']:.2f}", f"{sides[side]['predicted_loss']:.5f}"]
            cells += [f"{found[int(layer), side]:.5f}"] if found else []
        table.add_row(*cells)
    return table
