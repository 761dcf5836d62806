"""Long-context tasks: what is still answered, compared with the 16-bit cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowkv.evaluate.task_rows import BY_DEPTH
from narrowkv.evaluate.tasks import BASELINE
from narrowkv.report.plots import new_figure, style_of
from narrowkv.report.sections import Plot, Section, Table

if TYPE_CHECKING:
    from narrowkv.report.sections import Cell

CAN = 0.5  # of the rows that the 16-bit cache answers, below which the model is said not to do a task
Scores = dict[tuple[str, int, float | None], dict[str, float]]  # by task, length and depth, then by recipe
STRICT = (
    "A row counts if its whole answer is what the model would say greedily, every element attended to being quantized "
    "(strict). "
)


def sections(result: dict[str, Any]) -> list[Section]:
    """Tables and plots of what `narrowkv tasks` has written so far."""
    rows: list[dict[str, Any]] = result["rows"]
    own = [row for row in rows if "sha256" not in row]
    files = [row for row in rows if "sha256" in row]
    found = []
    deep, flat = _scores(own, True), _scores(own, False)
    if deep:
        text = "A password is stated at a depth of a text, among three others, and queried at its end. " + STRICT
        plots = [_heat_maps(task, deep) for task in dict.fromkeys(task for task, _, _ in deep)]
        found.append(Section("Passkey by depth and length", text + _cannot(deep), [_table(deep, True)], plots))
    if flat:
        found.append(Section("Tasks by length", STRICT + _cannot(flat), [_table(flat, False)], [_lines(flat)]))
    if files:
        found.append(Section("Files", _about_files(files), [_file_table(files)]))
    return found


def _scores(rows: list[dict[str, Any]], by_depth: bool) -> Scores:
    scores: Scores = {}
    for row in rows:
        if (row["task"] in BY_DEPTH) == by_depth:
            scores.setdefault((row["task"], row["length"], row["depth"]), {})[row["recipe"]] = row["score"]
    tasks = list(dict.fromkeys(task for task, _, _ in scores))
    return {key: scores[key] for key in sorted(scores, key=lambda key: (tasks.index(key[0]), key[1], key[2] or 0.0))}


def _recipes(scores: Scores) -> list[str]:
    return list(dict.fromkeys(recipe for by_recipe in scores.values() for recipe in by_recipe))


def _baselines(scores: Scores) -> dict[str, float]:
    """The mean score of the model itself in each task."""
    found: dict[str, list[float]] = {}
    for (task, _, _), by_recipe in scores.items():
        if BASELINE in by_recipe:
            found.setdefault(task, []).append(by_recipe[BASELINE])
    return {task: sum(means) / len(means) for task, means in found.items()}


def _cannot(scores: Scores) -> str:
    """A sentence on the tasks that the model itself does not do."""
    failed = [f"{task} ({mean:.0%})" for task, mean in _baselines(scores).items() if mean < CAN]
    if not failed:
        return ""
    return f"The model itself, with 16 bits, does not do {', '.join(failed)}: those metrics say nothing about recipes."


def _table(scores: Scores, by_depth: bool) -> Table:
    recipes = _recipes(scores)
    columns = ["length", "depth"] if by_depth else ["length"]
    cells: list[list[Cell]] = [
        [task, *([length, depth] if by_depth else [length]), *(_percent(by_recipe.get(recipe)) for recipe in recipes)]
        for (task, length, depth), by_recipe in scores.items()
    ]
    return Table("Rows answered without error, %", ["task", *columns, *recipes], cells, dict.fromkeys(recipes, 0))


def _percent(score: float | None) -> float | None:
    return None if score is None else 100 * score


def _heat_maps(task: str, scores: Scores) -> Plot:
    recipes = _recipes(scores)
    lengths = sorted({length for name, length, _ in scores if name == task})
    depths = sorted({depth for name, _, depth in scores if name == task and depth is not None})
    columns = min(len(recipes), 3)
    lines = -(-len(recipes) // columns)
    width = max(2.6, 0.62 * len(lengths) + 0.6)
    height = max(2.2, 0.36 * len(depths) + 0.7)
    figure, panels = new_figure(width * columns + 1.4, height * lines, lines, columns, sharex=True, sharey=True)
    image = None
    for axes, recipe in zip(panels, recipes, strict=False):
        cells = [[scores.get((task, length, depth), {}).get(recipe, float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for i, line in enumerate(cells):
            for j, score in enumerate(line):
                if score == score:
                    color = "black" if score > 0.55 else "white"
                    axes.text(j, i, f"{100 * score:.0f}", ha="center", va="center", color=color, fontsize=9)
        axes.set_title(recipe)
        axes.grid(False)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths])
    for axes in panels[len(recipes) :]:
        axes.set_visible(False)
    for i, axes in enumerate(panels[: len(recipes)]):
        if i + columns >= len(recipes):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("length, tokens")
        if i % columns == 0:
            axes.set_ylabel("depth")
    assert image is not None
    bar = figure.colorbar(image, ax=panels, label="rows answered, %", ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
    caption = f"{task}: share of rows answered, by how deep in how long a text the answer was stated."
    return Plot(task, caption, figure)


def _lines(scores: Scores) -> Plot:
    recipes, baselines, tasks = _recipes(scores), _baselines(scores), list(dict.fromkeys(task for task, _, _ in scores))
    columns = min(len(tasks), 2)
    figure, panels = new_figure(
        4.2 * columns, 2.9 * -(-len(tasks) // columns) + 0.5, -(-len(tasks) // columns), columns, sharey=True
    )
    for axes, task in zip(panels, tasks, strict=False):
        lengths = [length for name, length, _ in scores if name == task]
        for i, recipe in enumerate(recipes):
            own: dict[str, Any] = {"color": "black", "linestyle": "--", "zorder": 3}
            line = own if recipe == BASELINE else style_of(i - 1)
            values = [scores[task, length, None].get(recipe, float("nan")) for length in lengths]
            axes.plot(range(len(lengths)), [100 * value for value in values], label=recipe, **line)
        axes.set_title(task if baselines.get(task, 1.0) >= CAN else f"{task} (the model itself cannot)")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_xlim(-0.2, len(lengths) - 0.8)
        axes.set_ylim(-4, 104)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    for i, axes in enumerate(panels[: len(tasks)]):
        if i + columns >= len(tasks):
            axes.set_xlabel("length, tokens")
        if i % columns == 0:
            axes.set_ylabel("rows answered, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(recipes), 6), frameon=False)
    return Plot("lengths", "Share of rows answered by length of the text, for each task and recipe.", figure)


def _about_files(rows: list[dict[str, Any]]) -> str:
    return (
        "Greedy answers, scored from 0 to 100 by the measure of the data set; the prompt attends exactly to itself and the "
        "answer to the packed prompt, as in use. Prompts of LongBench are plain ones, so compare recipes with one another, "
        f"not with published tables. {sum(row['rows'] for row in rows if row['recipe'] == BASELINE):,} questions."
    )


def _file_table(rows: list[dict[str, Any]]) -> Table:
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    cells: list[list[Cell]] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        by_recipe = {row["recipe"]: row for row in rows if row["task"] == task}
        first = next(iter(by_recipe.values()))
        name = "/".join(Path(task).parts[-2:])
        scores = [_percent(by_recipe[recipe]["score"]) if recipe in by_recipe else None for recipe in recipes]
        cells.append([name, first["measure"], first["rows"], first["length"], *scores])
    return Table("Scores", ["file", "measure", "questions", "mean tokens", *recipes], cells, dict.fromkeys(recipes, 1))
