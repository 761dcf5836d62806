"""Tables of tasks on real models, from results/tasks."""

from benchmarks.tasks.__main__ import interval

from narrowkv.evaluate.results import read_result
from narrowkv.evaluate.tasks import BASELINE
from pages import ROOT, markdown, source

TASKS = ROOT / "results" / "tasks"


def tasks(name: str) -> str:
    """A model's table: for each kind of cache and task, how many are right, and the paired difference to 16 bits."""
    result = read_result(TASKS / f"{name}.json", "real-tasks")
    passed: dict[tuple[str, int | None], dict[str, list[bool]]] = {}
    for row in result["rows"]:
        passed.setdefault((row["task"], row["length"]), {})[row["recipe"]] = row["passed"]
    recipes = list(dict.fromkeys(row["recipe"] for row in result["rows"]))
    heads = [
        f"{task}{f', {length:,} tokens' if length else ''} ({len(found[BASELINE])})"
        for (task, length), found in passed.items()
    ]
    lines = [
        [
            recipe if recipe == BASELINE else f"`{recipe}`",
            *(compared(found.get(recipe), found[BASELINE]) for found in passed.values()),
        ]
        for recipe in recipes
    ]
    return f"{markdown(['', *heads], lines)}\n{source(result)}\n"


def compared(passed: list[bool] | None, exact: list[bool]) -> str:
    """How many are right, the difference to the exact cache, and its interval."""
    if passed is None:
        return "-"
    if passed is exact:
        return str(sum(exact))
    differences = [ours - theirs for ours, theirs in zip(passed, exact, strict=True)]
    low, high = interval(differences)
    return f"{sum(passed)} ({sum(differences):+d}; {low:+d} to {high:+d})"
