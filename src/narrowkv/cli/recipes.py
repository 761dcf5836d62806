"""`narrowkv recipes`: list all recipes, or show one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from narrowkv.cli.common import out, wide_console
from narrowkv.cli.options import file_to_write
from narrowkv.files import write_json

if TYPE_CHECKING:
    from narrowkv.codec import Scheme
    from narrowkv.methods import Recipe

app = typer.Typer(help="List recipes, or show one.", no_args_is_help=True)


def describe(recipe: "Recipe") -> tuple[str, str, str]:
    """Keys, values and exact tokens of a recipe in a few words each."""
    counts = {"first": recipe.sinks, "newest": recipe.residual_length}
    exact = ", ".join(f"{which} {count}" for which, count in counts.items() if count) or "-"
    space = recipe.search_space
    if space is None:
        return recipe.keys.describe(), recipe.values.describe(), exact
    keys, values = (
        _choice(schemes, budget) for schemes, budget in zip((space.keys, space.values), space.budgets, strict=True)
    )
    return keys, values + (", equal layers" if space.equal_layers else ""), exact


def _choice(schemes: "Sequence[Scheme]", budget: float) -> str:
    """What calibration chooses from under a budget of bits: the first of it, and how much else."""
    others = len(schemes) - 1
    rest = f" or {others} other{'s' * (others > 1)}" if others else ""
    return f"{schemes[0].describe()}{rest}; under {budget:g} bits"


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
        needed = "needed" if recipe.needs_calibration else "none"
        found = [losses.get(name, {}).get(model) for model in models]
        measured = [f"{loss.encyclopedia:.3f} / {loss.code:.3f} at {loss.bits:.2f}" if loss else "-" for loss in found]
        table.add_row(name, *describe(recipe), needed, *measured)
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
