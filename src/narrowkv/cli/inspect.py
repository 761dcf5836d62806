"""`narrowkv inspect`: plots of a model's keys and values."""

from typing import Annotated

import typer

from narrowkv.cli.common import command_line, load_model, named, note_mix, progress, show_sections, texts_to_learn
from narrowkv.cli.options import (
    BackendOption,
    BosOption,
    DeviceOption,
    DtypeOption,
    FolderOption,
    LearnedTextOption,
    ModelArgument,
    WindowOption,
)
from narrowkv.defaults import AUTO, INSPECTED


def inspect(
    model: ModelArgument,
    out: FolderOption,
    layer: Annotated[
        int | None, typer.Option(help="Index of the layer whose elements are drawn, from 0.", show_default="the middle one")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe whose codebook is drawn.")] = INSPECTED,
    text: LearnedTextOption = None,
    window: WindowOption = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Number of sequences.")] = 4,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
    bos: BosOption = None,
) -> None:
    """Plot keys and values: magnitudes by channel, token and layer, outliers, codebooks with their data, Fisher weight."""
    from narrowkv.evaluate import cut_windows
    from narrowkv.evaluate import inspect as inspecting
    from narrowkv.evaluate.results import ResultFile, read_result
    from narrowkv.evaluate.sources import read_texts
    from narrowkv.report.inspect import sections

    sources = texts_to_learn(model, text)
    settings = {"model": model, "layer": layer, "recipe": recipe, "text": named(sources), "window": window, "samples": samples}
    path = out / f"{inspecting.KIND}.json"
    results = ResultFile(path, inspecting.KIND, command_line(), {**settings, "dtype": dtype, "backend": backend, "bos": bos})
    words = read_texts(sources)
    loaded, tokenizer = load_model(model, dtype, device)
    note_mix(model, text)
    batches = cut_windows(tokenizer, words, window, samples, bos=bos).split(1)
    with progress("looking") as advance:
        inspecting.inspect(loaded, batches, results, layer, recipe, backend=backend, on_step=advance)
    show_sections(sections(read_result(path)), out, inspecting.KIND)
