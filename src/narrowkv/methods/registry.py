"""The names of all recipes: each method module offers `NAMES` and `recipe(name)`."""

from pathlib import Path
from types import ModuleType

from narrowkv.errors import RecipeError
from narrowkv.methods import exact, hadamard, intrinsic, kivi, kvquant, narrow, nvfp4, rounding, smooth
from narrowkv.methods.recipe import Recipe

METHODS: tuple[ModuleType, ...] = (
    exact,
    narrow,
    kvquant,
    kivi,
    rounding,
    nvfp4,
    hadamard,
    smooth,
    intrinsic,
)


def recipe_names() -> list[str]:
    """Names of the presets, in the order of the methods."""
    return [name for method in METHODS for name in method.NAMES]


def get_recipe(name: "str | Path | Recipe") -> Recipe:
    """The recipe called `name`, or read from the JSON file of that name; raises RecipeError and lists what exists."""
    if isinstance(name, Recipe):
        return name
    if not isinstance(name, str | Path):
        raise RecipeError(f"A recipe is wanted, or the name of one ({', '.join(recipe_names()[:3])}, ...), not {name!r:.80}.")
    name = str(name)
    for method in METHODS:
        found: Recipe | None = method.recipe(name)
        if found is not None:
            return found
    if Path(name).suffix == ".json":
        return Recipe.from_file(name)
    raise RecipeError(
        f"There is no recipe {name!r}; there are {', '.join(recipe_names())} (nuq takes any percentage up to 2%)."
    )
