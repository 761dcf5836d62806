"""Write docs/leaderboard.html from the files of results: part of `make results`.

One page without network: recipes by model with their bits and losses, tasks, and speed where it was measured. A click sorts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from narrowkv.evaluate.results import read_result
from narrowkv.files import read_json
from narrowkv.report import tasks
from narrowkv.report.page import Part, render
from narrowkv.report.sections import Section, Table

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "leaderboard.html"
ADDRESS = "https://github.com/narrowkv/narrowkv/blob/main/results/"
Row = dict[str, Any]
DIGITS = {"KLD": 4, "KLD 99%": 3, "top-1 %": 1, "recall %": 0}


def losses(rows: list[Row], caption: str) -> Table:
    """One line for each recipe: bits and losses; recall where it was measured."""
    columns = {
        "recipe": lambda row: row["recipe"],
        "bits": lambda row: row["bits_per_element"],
        "KLD": lambda row: row["kld_strict"],
        "KLD 99%": lambda row: row["kld_strict_p99"],
        "perplexity": lambda row: row["perplexity_strict"],
        "unquantized": lambda row: row["perplexity_fp"],
        "top-1 %": lambda row: 100 * row["top1"],
    }
    if all(row.get("recall") is not None for row in rows):
        columns["recall %"] = lambda row: 100 * row["recall"]
    lines = [[read(row) for read in columns.values()] for row in sorted(rows, key=lambda row: row["bits_per_element"])]
    return Table(caption, [*columns], lines, DIGITS)


def real_models(result: Row) -> list[Section]:
    """A section for each text and length of windows, with tables learned from the mix."""
    rows = [row for row in result["rows"] if row["tables"] == "mix"]
    sections = []
    for text, window in dict.fromkeys((row["text"], row["window"]) for row in rows):
        found = [row for row in rows if (row["text"], row["window"]) == (text, window)]
        words = f"{found[0]['tokens']:,} tokens of {text} in windows of {window:,}, strict."
        sections.append(
            Section(f"{text.capitalize()}, windows of {window:,}", words, [losses(found, "Recipes by loss and bits")])
        )
    return sections


def demo(result: Row) -> list[Section]:
    """The built-in model."""
    first = result["rows"][0]
    words = f"{first['tokens']:,} tokens in windows of {first['window']:,}, strict."
    return [Section("Text and passwords", words, [losses(result["rows"], "Recipes by loss, bits and recall")])]


def attention(result: Row) -> list[Section]:
    """Time of one token's attention, and how many times as fast as torch's best over 16 bits."""
    columns = ["recipe", "tokens", "batch", "threads", "ms", "times torch bf16", "torch uses"]
    names = ["recipe", "tokens", "batch", "threads", "milliseconds", "ratio_bfloat16", "torch_uses"]
    lines = [[row[name] for name in names] for row in result["rows"]]
    return [
        Section("Attention of one token", "One query token over a packed cache.", [Table("Time by recipe", columns, lines)])
    ]


SECTIONS: dict[str, Callable[[Row], list[Section]]] = {
    "real-models": real_models,
    "demo": demo,
    "tasks": tasks.sections,
    "attention": attention,
}


def parts(results: Path) -> list[Part]:
    """A part of the page for each file whose kind has sections, kinds in the order above."""
    files = {path: read_json(path).get("kind") for path in sorted(results.rglob("*.json"))}
    found = []
    for kind, make in SECTIONS.items():
        for path in (path for path, other in files.items() if other == kind):
            result = read_result(path, kind)
            name = path.relative_to(results).as_posix()
            sections = [
                Section(part.title, part.text, part.tables) for part in make(result)
            ]  # plots would need files of their own
            title = result["settings"].get("model", path.stem).removeprefix("narrowkv://")
            found.append(Part(name.removesuffix(".json").replace("/", "-"), title, ADDRESS + name, result, sections))
    return found


def write_leaderboard(results: Path = RESULTS, page: Path = PAGE) -> None:
    """The page of all results."""
    page.write_text(render("Leaderboard: what recipes lose and take", parts(results)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_leaderboard()
