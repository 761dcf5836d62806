"""`narrowkv recipes`: list all recipes, or show one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from narrowkv.cli.common import out, wide_console
from narrowkv.cli.options import file_to_write
from narrowkv.files import write_json

if TYPE_CHECKING:
    from narrowkv.codec import Scheme

app = typer.Typer(help="List recipes, or show one.", no_args_is_help=True)


def describe(scheme: "Scheme") -> str:
    """A scheme in a few words."""
    if scheme.datatype == "exact":
        return "exact"
    if scheme.datatype == "trellis":
        parts = [f"{scheme.bits:g} bits, trellis-coded", *(["rotated"] if scheme.learned_rotation else [])]
        parts += ["token norms"] if scheme.token_norm else []
    else:
        parts = [f"{scheme.datatype}{scheme.bits}", f"per {scheme.strategy.replace('_', ' and ')}"]
    parts += ["pre-RoPE"] if scheme.pre_rope else []
    parts += [f"{100 * scheme.outliers:g}% exact"] if scheme.outliers else []
    return ", ".join([*parts, "Q-Norm"] if scheme.qnorm else parts)


@app.command("list")
def list_recipes() -> None:
    """List all recipes with their schemes and their measured loss on real models."""
    from narrowkv.methods import get_recipe, recipe_names
    from narrowkv.methods.measured import measured_losses

    losses = measured_losses()
    models = list(dict.fromkeys(model for by_model in losses.values() for model in by_model))
    table = Table("recipe", "keys", "values", "exact tokens", "calibration", *models)
    for name in recipe_names():
        recipe = get_recipe(name)
        exact = ", ".join(
            text
            for count, text in (
                (recipe.sinks, f"first {recipe.sinks}"),
                (recipe.residual_length, f"newest {recipe.residual_length}"),
            )
            if count
        )
        needed = "needed" if recipe.needs_calibration else "none"
        keys, values = describe(recipe.keys), describe(recipe.values)
        if recipe.search_space:
            keys, values = (
                f"trellis-coded, rates by channel under {budget:g} bits"
                if recipe.search_space.by_rate
                else f"one of {len(every)} under {budget:g} bits"
                for every, budget in zip(
                    (recipe.search_space.keys, recipe.search_space.values), recipe.search_space.budgets, strict=True
                )
            )
        found = [losses.get(name, {}).get(model) for model in models]
        measured = [f"{loss.encyclopedia:.3f} / {loss.code:.3f} at {loss.bits:.2f}" if loss else "-" for loss in found]
        table.add_row(name, keys, values, exact or "-", needed, *measured)
    table.caption = (
        "Of models: the divergence from the exact one in nats for a token, on encyclopedia text / source code, at the bits "
        "that a cache of 32,768 tokens takes for each element, everything counted."
    )
    wide_console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A recipe's name or a JSON file.")],
    json_file: Annotated[
        Path | None,
        typer.Option("--json", parser=file_to_write, metavar="FILE", help="Write the recipe to this file, for editing."),
    ] = None,
) -> None:
    """Show one recipe in full, as JSON."""
    from narrowkv.methods import get_recipe

    plain = get_recipe(name).to_dict()
    if json_file is not None:
        write_json(json_file, plain)
    out.print_json(json.dumps(plain))
