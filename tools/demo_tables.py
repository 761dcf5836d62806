"""Tables and plots of the built-in model in docs, from the files that the commands of the CLI write."""

from pathlib import Path
from typing import Any

from narrowkv.evaluate.results import read_result
from narrowkv.report import ablate, compare, inspect, tasks
from narrowkv.report.plots import save
from narrowkv.report.sections import Section, Table
from pages import ROOT, markdown, replace_block, source

RESULTS = ROOT / "results"


def result_of(kind: str) -> dict[str, Any]:
    """What a command has found."""
    return read_result(RESULTS / f"demo-{kind}" / f"{kind}.json", kind)


def plotted(sections: list[Section], names: dict[str, Path]) -> None:
    """Save the plots with these names."""
    for section in sections:
        for plot in section.plots:
            if plot.name in names:
                save(plot.figure, names[plot.name])


def in_markdown(table: Table, kept: list[str] | None = None) -> str:
    """A table, or some of its columns."""
    columns = kept or table.columns
    chosen = [table.columns.index(column) for column in columns]
    rows = [[table.shown(row)[i] for i in chosen] for row in table.rows]
    return markdown(columns, rows)


def write_compare(docs: Path) -> None:
    """Recipes side by side."""
    result = result_of("compare")
    sections = compare.sections(result)
    plotted(sections, {"pareto": docs / "evaluation-pareto.svg"})
    (table,) = sections[0].tables
    kept = [column for column in table.columns if column not in ("ms a token", "least")]
    replace_block(docs / "evaluation.md", "compare", f"{in_markdown(table, kept)}\n{source(result)}\n")


def write_ablate(docs: Path) -> None:
    """What each step of KVQuant gains."""
    result = result_of("ablate")
    plotted(ablate.sections(result), {"steps": docs / "evaluation-steps.svg"})
    rows = [row for row in result["rows"] if row["ablation"] == "steps"]
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    found = {(row["label"], row["bits"]): row["kld_strict"] for row in rows}
    labels = list(dict.fromkeys(row["label"] for row in sorted(rows, key=lambda row: row["step"])))
    cells = [[label, *(f"{found[label, bits]:.4f}" for bits in widths)] for label in labels]
    table = markdown(["step", *(f"{bits} bits" for bits in widths)], cells)
    replace_block(docs / "evaluation.md", "steps", f"{table}\n{source(result)}\n")


def write_tasks(docs: Path) -> None:
    """Recall of long contexts: the mean over depths, by task and length."""
    result = result_of("tasks")
    plotted(tasks.sections(result), {"passkey": docs / "tasks-passkey.svg"})
    scores: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in result["rows"]:
        scores.setdefault((row["task"], row["length"]), {}).setdefault(row["recipe"], []).append(row["score"])
    recipes = list(dict.fromkeys(row["recipe"] for row in result["rows"]))
    cells = [
        [task, f"{length:,}", *(f"{sum(found[recipe]) / len(found[recipe]):.0%}" for recipe in recipes)]
        for (task, length), found in scores.items()
    ]
    heads = ["task", "length", *(recipe if " " in recipe else f"`{recipe}`" for recipe in recipes)]
    replace_block(docs / "tasks.md", "demo-tasks", f"{markdown(heads, cells)}\n{source(result)}\n")


def write_inspect(docs: Path) -> None:
    """Distributions of keys and values."""
    result = result_of("inspect")
    sections = inspect.sections(result)
    names = ("magnitude", "distribution", "ranges")
    plotted(sections, {name: docs / f"inspect-{name}.svg" for name in names})
    outliers, layers = (table for section in sections for table in section.tables)
    text = f"{in_markdown(outliers)}\n{source(result)}\n"
    replace_block(docs / "inspect.md", "outliers", text)
    replace_block(docs / "inspect.md", "layers", in_markdown(layers))


def write_harness(docs: Path) -> None:
    """The score of lm-evaluation-harness."""
    result = read_result(RESULTS / "harness" / "demo.json", "harness")
    cells = [[f"`{row['recipe']}`", f"{row['accuracy']:.0%}"] for row in result["rows"]]
    table = markdown(["recipe", f"accuracy, {result['settings']['rows']} rows"], cells)
    replace_block(docs / "results.md", "harness", f"{table}\n{source(result)}\n")


def write_all(docs: Path) -> None:
    """All of them, into a folder of pages."""
    write_compare(docs)
    write_ablate(docs)
    write_tasks(docs)
    write_inspect(docs)
    write_harness(docs)
