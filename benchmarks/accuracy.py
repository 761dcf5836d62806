"""Every method at its true bits: `python -m benchmarks.accuracy --out FOLDER [--models NAME ...] [--picture FILE]`.

Calibrated on one part of a text, measured on another, as `narrowkv compare` does it: one file of figures for each model in the
folder, and a run that was interrupted goes on. Bits are those that a cache of 32,768 tokens allocates, all counted.
`narrowkv://demo` is the built-in model; other models are folders, measured on TinyStories from NARROWKV_ASSETS. With
`--across` calibration reads another kind of text: stories for the built-in model, its training text for the others.
"""

import argparse
import os
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from narrowkv import get_recipe, load_model
from narrowkv.evaluate.compare import DYNAMIC, KIND, CompareOptions, compare
from narrowkv.evaluate.results import ResultFile
from narrowkv.evaluate.sources import read_text
from narrowkv.integrations.models import DEMO
from narrowkv.report.compare import draw_pareto
from narrowkv.report.figures import new_figure, save

ASSETS = Path(os.environ.get("NARROWKV_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
RECIPES = (
    *("narrow4", "narrow3", "narrow2", "narrow3.0", "narrow2.5"),
    *("nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq2-1%-qnorm", "nuq4", "nuq3", "nuq2"),
    *("nuq3.0", "nuq3-1%-postrope", "kivi-4", "kivi-2", "kivi-4-g32-r0", "kivi-2-g32-r0"),
    *("int8", "int4", "int3", "int2", "int4-head", "int3-head", "int2-head", "int4-channel", "int3-channel"),
    *("nf4", "nf3", "nf2", "fp8", "fp4", "nvfp4", "smooth-int8", "hadamard-int4", "hadamard-int3", "hadamard-int2"),
    *("intrinsic-2", "intrinsic-2-nearest"),
)
MOST_BITS = 5.2  # in the picture
PICTURED = r"narrow\d(\.\d)?|nuq\d(-1%)?|kivi-.*-r0|hadamard.*|int\d|nvfp4"


def texts(name: str, across: bool) -> tuple[str, str]:
    """What to calibrate and what to measure a model on."""
    own = (read_text("narrowkv://train"), read_text("narrowkv://held-out"))
    if name == DEMO and not across:
        return own
    stories = (ASSETS / "text" / "tinystories-sample.txt").read_text(encoding="utf-8")
    if name == DEMO:
        return stories, own[1]
    return own[0] if across else stories[:1_000_000], stories[1_000_000:]


def rows(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of all recipes on one model; those whose groups do not fill its heads are left out."""
    model, tokenizer = load_model(name, "float32")
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    recipes = [get_recipe(recipe) for recipe in options.recipes]
    recipes = [recipe for recipe in recipes if recipe.values.axis == "block" or head_dim % (recipe.values.group or 1) == 0]
    learn_from, measure_on = texts(name, options.across)
    chosen = CompareOptions(
        window=options.window,
        limit=options.windows,
        samples=options.samples,
        decode_steps=0,
        recall_distance=512 if name == DEMO and options.recall_rows else 0,
        recall_rows=options.recall_rows,
    )
    model_name = Path(name).name
    settings = {
        "model": model_name,
        "text": "built-in" if name == DEMO else "stories",
        "across": options.across,
        **asdict(chosen),
    }
    results = ResultFile(
        options.out / f"{model_name}.json", KIND, shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]]), settings
    )
    compare(model, tokenizer, recipes, measure_on, learn_from, chosen, results)
    return [row | {"model": model_name} for row in results.rows if row["recipe"] != DYNAMIC]


def table(found: list[dict[str, Any]]) -> str:
    """One model's figures in Markdown, best divergence first."""
    first = found[0]
    lines = [
        f"`{first['model']}`, {first['tokens']:,} tokens in windows of {first['window']}; 16 bit: perplexity "
        f"{first['perplexity_fp']:.3f}" + ("" if first["recall_fp"] is None else f", recall {first['recall_fp']:.0%}"),
        "",
        "| recipe | bits at 32K | perplexity strict | stream | KLD strict, mean | 99% | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: row["kld_strict"]):
        recall = "-" if row["recall"] is None else f"{row['recall']:.0%}"
        lines.append(
            f"| `{row['recipe']}` | {row['bits_per_element']:.2f} | {row['perplexity_strict']:.3f} "
            f"| {row['perplexity_stream']:.3f} | {row['kld_strict']:.4f} | {row['kld_strict_p99']:.3f} | {recall} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Divergence over bits up to MOST_BITS, one panel for each model."""
    models = list(dict.fromkeys(row["model"] for row in found))
    figure, panels = new_figure(5 * len(models), 5, columns=len(models))
    for axes, model in zip(panels, models, strict=True):
        shown = [row for row in found if row["model"] == model and re.fullmatch(PICTURED, row["recipe"])]
        points = [(row["recipe"], row["bits_per_element"], row["kld_strict"]) for row in shown]
        draw_pareto(axes, [point for point in points if point[1] <= MOST_BITS])
        axes.set(title=model, xlabel="allocated bits for each number at 32,768 tokens")
    panels[0].legend(fontsize=8, loc="upper right", frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = [DEMO, *(str(ASSETS / "models" / name) for name in ("stories260K", "babyllama-tok105") if ASSETS.exists())]
    parser.add_argument("--models", nargs="+", default=own)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--recall-rows", type=int, default=64)
    parser.add_argument("--across", action="store_true", help="calibrate on another kind of text than is measured")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    found = []
    for name in options.models:
        own_rows = rows(name, options)
        print(table(own_rows), flush=True)
        found += own_rows
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
