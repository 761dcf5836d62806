"""Tables and plots of tasks on real models and of long generations, from results/tasks and results/drift."""

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.tasks.__main__ import interval

from narrowkv.evaluate.results import read_result
from narrowkv.evaluate.tasks import BASELINE
from narrowkv.report.plots import COLORS, log_axis, new_figure, save
from pages import ROOT, markdown, source

TASKS, DRIFT = ROOT / "results" / "tasks", ROOT / "results" / "drift"
TEXTS = ("encyclopedia", "code")


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


def drift(name: str) -> str:
    """A model's table: divergence in the first, the middle and the last tokens of a long generation."""
    result = read_result(DRIFT / f"{name}.json", "drift")
    width = result["settings"]["bin"]
    count = result["settings"]["new_tokens"] // width
    shown = (0, count // 2, count - 1)
    heads = [f"tokens {width * i + 1:,} to {width * (i + 1):,}" for i in shown]
    modes = ("stream", "strict")
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        found = {row["mode"]: bins(row) for row in result["rows"] if row["recipe"] == recipe}
        lines.append([f"`{recipe}`", *(f"{found[mode][i]:.4f}" for mode in modes for i in shown)])
    columns = ["recipe", *(f"{mode}: {head}" for mode in modes for head in heads)]
    return f"{markdown(columns, lines)}\n{source(result)}\n"


def bins(row: dict[str, Any]) -> list[float]:
    """Divergence by position, the mean of both texts."""
    return [mean(both) for both in zip(*(row[text] for text in TEXTS), strict=True)]


def draw_drift(names: dict[str, str], path: Path) -> None:
    """Divergence by position as in use: a panel for each model, a line for each recipe."""
    figure, panels = new_figure(7 * len(names), 4, columns=len(names))
    for axes, (model, name) in zip(panels, names.items(), strict=True):
        result = read_result(DRIFT / f"{name}.json", "drift")
        width = result["settings"]["bin"]
        rows = [row for row in result["rows"] if row["mode"] == "stream"]
        for row, color in zip(rows, COLORS, strict=False):
            found = bins(row)
            axes.plot([width * (i + 0.5) for i in range(len(found))], found, marker="o", color=color, label=row["recipe"])
        log_axis(axes.yaxis)
        axes.set_xlabel("tokens generated")
        axes.set_ylabel("KL divergence from 16 bit (nats)")
        axes.set_title(f"{model}: lower is better")
        axes.legend(frameon=False)
    save(figure, path)
