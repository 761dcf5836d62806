"""Draw the README's picture and write its table from what `narrowkv demo --json FILE` measured.

python tools/draw_demo.py FILE --hardware "2 cores of ..."
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo:begin -->\n", "<!-- demo:end -->"
FAMILIES = {  # recipes, a colour that colour-blind readers can tell apart, a marker, where labels stand
    "ours: pairs, turned values, mixed widths": ("narrow4", "narrow3", "narrow2", "#CC79A7", "D", (8, 4)),
    "KVQuant, 1% outliers": ("nuq4-1%", "nuq3-1%", "nuq2-1%", "#0072B2", "o", (8, 4)),
    "KVQuant, no outliers": ("nuq4", "nuq3", "nuq2", "#009E73", "s", (-28, -14)),
    "integer per token": ("int4", "int3", "int2", "#D55E00", "^", (8, 4)),
}


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """KL divergence over allocated bits, a line for each kind of recipe."""
    plt.rcParams["svg.hashsalt"] = "narrowkv"
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, (*names, colour, marker, offset) in FAMILIES.items():
        bits = [rows[name]["bits_per_element"] for name in names]
        divergence = [rows[name]["kld_strict"] for name in names]
        axes.plot(bits, divergence, marker=marker, color=colour, label=label, linewidth=2, markersize=8)
        for name, x, y in zip(names, bits, divergence, strict=True):
            axes.annotate(name, (x, y), textcoords="offset points", xytext=offset, fontsize=9, color=colour)
    axes.set_yscale("log")
    axes.set_xlabel("allocated bits for each number, everything counted")
    axes.set_ylabel("KL divergence from 16 bit (nats, strict)")
    axes.set_title("The built-in model on text it was not trained on: lower is better", fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def table(rows: list[dict[str, Any]], hardware: str) -> str:
    """The figures as a Markdown table with its caption."""
    first = rows[0]
    lines = ["| recipe | bits | of 16 bit | perplexity strict | perplexity stream | KLD strict | recall |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| `{row['recipe']}` | {row['bits_per_element']:.2f} | {row['nbytes'] / row['nbytes_fp16']:.0%} "
            f"| {row['perplexity_strict']:.2f} | {row['perplexity_stream']:.2f} | {row['kld_strict']:.4f} "
            f"| {row['recall']:.0%} |"
        )
    caption = (
        f"The built-in model, {first['tokens']:,} tokens in windows of {first['window']}; unquantised perplexity "
        f"{first['perplexity_fp']:.2f}, recall {first['recall_fp']:.0%}. "
        f"`narrowkv demo --recall-rows 128` on {hardware}, {date.today()}."
    )
    return "\n".join(lines) + f"\n\n{caption}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--hardware", required=True, help="in words, without names of machines")
    arguments = parser.parse_args()
    rows = json.loads(arguments.file.read_text(encoding="utf-8"))
    draw({row["recipe"]: row for row in rows}, ROOT / "docs" / "demo.svg")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(before + BEGIN + table(rows, arguments.hardware) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
