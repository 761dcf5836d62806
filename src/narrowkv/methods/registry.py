"""The names of all recipes: each method module of this package offers `NAMES` and `recipe(name)`.

Packages that are installed add methods by the entry point group `narrowkv.recipes`, each entry a module of this form.
"""

import functools
import pkgutil
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from narrowkv.errors import RecipeError
from narrowkv.methods.recipe import Recipe

GROUP = "narrowkv.recipes"
FIRST = ("exact", "narrow", "kvquant", "kivi", "rounding")  # in lists of names; the others follow in alphabetical order
HELPERS = ("measured", "recipe", "registry")


@functools.cache
def methods() -> tuple[ModuleType, ...]:
    """Methods of this package: its modules but for HELPERS."""
    found = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}
    names = [*FIRST, *sorted(found.difference(FIRST, HELPERS))]
    return tuple(import_module(f"narrowkv.methods.{name}") for name in names)


@functools.cache
def methods_of_others() -> tuple[ModuleType, ...]:
    """Methods of other installed packages; raises RecipeError if one cannot be imported or lacks NAMES or recipe(name)."""
    found = []
    for entry in entry_points(group=GROUP):
        try:
            method = entry.load()
        except Exception as error:
            raise RecipeError(
                f"The recipes {entry.name} of another package cannot be loaded ({error}); mend or uninstall it."
            ) from error
        if not (callable(getattr(method, "recipe", None)) and hasattr(method, "NAMES")):
            raise RecipeError(
                f"The recipes {entry.name} of another package have no NAMES or no recipe(name); mend or uninstall it."
            )
        found.append(method)
    return tuple(found)


def recipe_names() -> list[str]:
    """Names of all presets, ordered by method; raises RecipeError if those of another package do not load."""
    return [name for method in (*methods(), *methods_of_others()) for name in method.NAMES]


def get_recipe(name: "str | Path | Recipe") -> Recipe:
    """The recipe of a name, or of a JSON file; raises RecipeError with the existing names if there is none."""
    if isinstance(name, Recipe):
        return name
    if not isinstance(name, str | Path):
        raise RecipeError(f"Expected a recipe or its name ({', '.join(recipe_names()[:3])}, ...), not {name!r:.80}.")
    name = str(name)
    found = _named(name, methods()) or _named(name, methods_of_others())  # names of ours are never another package's
    if found is not None:
        return found
    if Path(name).suffix == ".json":
        return Recipe.from_file(name)
    raise RecipeError(
        f"There is no recipe {name!r}; there are {', '.join(recipe_names())} (nuq takes any percentage up to 2%)."
    )


def _named(name: str, methods: Iterable[ModuleType]) -> Recipe | None:
    """The recipe that the first of some methods has under this name."""
    found: Iterator[Recipe | None] = (method.recipe(name) for method in methods)
    return next((recipe for recipe in found if recipe is not None), None)
