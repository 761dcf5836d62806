"""Write the tables and pictures of README.md and docs from the files of figures in results/: `make results`.

Every figure there was measured by the command in its file, which also has versions, hardware and date.
"""

from pathlib import Path
from typing import Any

from narrowkv.evaluate.results import read_result
from narrowkv.report.figures import COLOURS, MARKERS, log_axis, new_figure, save
from narrowkv.report.plan import length
from narrowkv.report.plan import sections as plan_sections

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "results", ROOT / "docs"
FAMILIES = {  # recipes, and where their labels stand in points
    "ours: pairs, turned values, mixed widths": ("narrow4", "narrow3", "narrow2", (8, 4)),
    "KVQuant, 1% outliers": ("nuq4-1%", "nuq3-1%", "nuq2-1%", (8, 4)),
    "KVQuant, no outliers": ("nuq4", "nuq3", "nuq2", (-28, -14)),
    "integer per token": ("int4", "int3", "int2", (8, 4)),
}
PLANNED = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")


def replace_block(path: Path, name: str, text: str) -> None:
    """Put text between the marks `<!-- name:begin -->` and `<!-- name:end -->` of a page."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    page = path.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"{path.name} has no place for {name}: it needs one pair of marks {begin.strip()} and {end}.")
    before, _, rest = page.partition(begin)
    path.write_text(before + begin + text + end + rest.partition(end)[2], encoding="utf-8")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(result: dict[str, Any]) -> str:
    """Where figures come from: the command, the hardware, the date."""
    found = result["environment"]
    return f"`{result['command']}` on {found['cores']} cores of an {found['processor']}, {result['date']}."


def draw_demo(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """KL divergence over allocated bits, a line for each kind of recipe."""
    figure, (axes,) = new_figure(7, 4)
    for (label, (*names, offset)), colour, marker in zip(FAMILIES.items(), COLOURS, MARKERS, strict=False):
        bits = [rows[name]["bits_per_element"] for name in names]
        divergence = [rows[name]["kld_strict"] for name in names]
        axes.plot(bits, divergence, marker=marker, color=colour, label=label, markersize=8)
        for name, x, y in zip(names, bits, divergence, strict=True):
            axes.annotate(name, (x, y), textcoords="offset points", xytext=offset, fontsize=9, color=colour)
    log_axis(axes.yaxis)
    axes.set_xlabel("allocated bits for each number, everything counted")
    axes.set_ylabel("KL divergence from 16 bit (nats, strict)")
    axes.set_title("The built-in model on text it was not trained on: lower is better")
    axes.margins(x=0.12)
    axes.legend(frameon=False)
    save(figure, path)


def write_demo() -> None:
    """README's table and docs/demo.svg."""
    result = read_result(RESULTS / "demo" / "demo.json", "demo")
    rows = result["rows"]
    draw_demo({row["recipe"]: row for row in rows}, DOCS / "demo.svg")
    columns = ["recipe", "bits", "of 16 bit", "perplexity strict", "perplexity stream", "KLD strict", "recall"]
    cells = [
        [
            f"`{row['recipe']}`",
            f"{row['bits_per_element']:.2f}",
            f"{row['nbytes'] / row['nbytes_fp16']:.0%}",
            f"{row['perplexity_strict']:.2f}",
            f"{row['perplexity_stream']:.2f}",
            f"{row['kld_strict']:.4f}",
            f"{row['recall']:.0%}",
        ]
        for row in rows
    ]
    first = rows[0]
    caption = (
        f"The built-in model, {first['tokens']:,} tokens in windows of {first['window']}; unquantised perplexity "
        f"{first['perplexity_fp']:.2f}, recall {first['recall_fp']:.0%}. {source(result)}\n"
    )
    replace_block(ROOT / "README.md", "demo", f"{markdown(columns, cells)}\n{caption}")


def write_plan() -> None:
    """The grid of docs/planner.md and its picture."""
    results = [read_result(RESULTS / name / "plan.json", "plan") for name in PLANNED]
    contexts = [at["tokens"] for at in results[0]["rows"][0]["contexts"]]
    columns = ["recipe", *(f"{name.removeprefix('llama-').upper()} {length(n)}" for name in PLANNED for n in contexts)]
    cells = [
        [f"`{rows[0]['recipe']}`", *(f"{at['prompt'] / 2**30:,.1f}" for row in rows for at in row["contexts"])]
        for rows in zip(*(result["rows"] for result in results), strict=True)
    ]
    commands = f"`narrowkv plan` of each shape with the options of {source(results[0])}"
    replace_block(DOCS / "planner.md", "plan", f"{markdown(columns, cells)}\n{commands}\n")
    (section,) = plan_sections(read_result(RESULTS / "llama-7b-80GiB" / "plan.json", "plan"))
    save(section.pictures[0].figure, DOCS / "planner.svg")


if __name__ == "__main__":
    write_demo()
    write_plan()
