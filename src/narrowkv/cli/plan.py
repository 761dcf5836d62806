"""`narrowkv plan`: the memory of a cache and the longest context, from a model's configuration alone."""

from typing import Annotated

import typer

from narrowkv.cli.common import command_line, listed, progress, show_sections, silence_transformers
from narrowkv.cli.options import DtypeOption, FolderOption
from narrowkv.defaults import SHAPES

RECIPES = "fp16,narrow4,narrow3,narrow2,nuq4-1%,nuq3-1%,nuq2-1%,kivi-2"


def plan(
    model: Annotated[
        str,
        typer.Argument(help=f"A local folder, a hub id, narrowkv://demo, or one of {', '.join(SHAPES)}.", metavar="MODEL"),
    ],
    out: FolderOption,
    recipes: Annotated[str, typer.Option(help="Names of recipes or JSON files, separated by commas.")] = RECIPES,
    context: Annotated[str, typer.Option(help="Lengths such as 131072, 128K or 1M, separated by commas.")] = "32K,128K,1M",
    memory: Annotated[
        str | None, typer.Option(help="Memory of each GPU, such as 80GB or 79.2GiB; adds the longest context.")
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(help="Memory reserved for activations and everything else, such as 2GiB.", show_default="nothing"),
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs that share the heads (tensor parallelism).")] = 1,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    dtype: DtypeOption = "auto",
    weight_bits: Annotated[
        float | None, typer.Option(help="Bits per weight, if weights are quantized.", show_default="those of the dtype")
    ] = None,
) -> None:
    """Compute the memory of a cache and the context that fits, without loading weights."""
    from narrowkv.evaluate.results import ResultFile, read_result
    from narrowkv.methods import get_recipe
    from narrowkv.plan import Budget, parse_bytes, parse_tokens, read_shape
    from narrowkv.plan import plan as make_plan
    from narrowkv.plan.planner import KIND
    from narrowkv.report.plan import sections

    silence_transformers()
    chosen = [get_recipe(name) for name in listed(recipes)]
    contexts = sorted({parse_tokens(length) for length in context.split(",")})
    available, reserved = (None if size is None else parse_bytes(size) for size in (memory, reserve))
    budget = Budget(batch, gpus, available, reserved or 0, weight_bits)
    shape = read_shape(model, dtype)
    path = out / f"{KIND}.json"
    results = ResultFile(path, KIND, command_line(), shape.to_dict() | budget.to_dict() | {"contexts": contexts})
    with progress("planning") as advance:
        make_plan(shape, chosen, contexts, budget, results, advance)
    show_sections(sections(read_result(path)), out, KIND)
