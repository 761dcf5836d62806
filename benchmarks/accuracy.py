"""Every method at its true bits: `python -m benchmarks.accuracy [--models NAME ...] [--json FILE] [--picture FILE]`.

Calibrated on one part of a text, measured on another. Bits are those that a cache of 32,768 tokens allocates, all counted.
`narrowkv://demo` is the built-in model; other models are folders, measured on TinyStories from NARROWKV_ASSETS. With
`--across` calibration reads another kind of text: stories for the built-in model, its training text for the others.
"""

import argparse
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from narrowkv import calibrate_many, get_recipe, load_model
from narrowkv.calibration.allocation import REFERENCE_TOKENS
from narrowkv.evaluate import cut_windows, measure
from narrowkv.evaluate.quality import bits_at
from narrowkv.evaluate.recall import facts, passages
from narrowkv.evaluate.sources import read_text
from narrowkv.integrations.models import DEMO

ASSETS = Path(os.environ.get("NARROWKV_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
RECIPES = (
    *("narrow4", "narrow3", "narrow2", "narrow3.0", "narrow2.5", "pair3", "pair3-1%", "pair2", "pair2-1%"),
    *("channel4", "channel3", "channel2", "nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq2-1%-qnorm", "nuq4", "nuq3", "nuq2"),
    *("nuq3.0", "nuq3-1%-postrope", "kivi-4", "kivi-2", "kivi-4-g32-r0", "kivi-2-g32-r0"),
    *("int8", "int4", "int3", "int2", "int4-head", "int3-head", "int2-head", "int4-channel", "int3-channel"),
    *("nf4", "nf3", "nf2", "fp8", "fp4", "nvfp4", "smooth-int8", "hadamard-int4", "hadamard-int3", "hadamard-int2"),
    *("intrinsic-2", "intrinsic-2-nearest"),
)
MOST_BITS = 5.2  # in the picture
FAMILIES = {  # of the picture: which recipes, colours that colour-blind readers can tell apart, markers
    "narrow (ours)": (r"narrow\d(\.\d)?", "#CC79A7", "D"),
    "one codebook a pair": (r"pair\d(-1%)?", "#E69F00", "v"),
    "one codebook a channel": (r"channel\d", "#56B4E9", "P"),
    "KVQuant, 1% outliers": (r"nuq\d-1%", "#0072B2", "o"),
    "KVQuant, no outliers": (r"nuq\d", "#009E73", "s"),
    "KIVI, no window": (r"kivi-.*-r0", "#F0E442", "<"),
    "Hadamard integers": (r"hadamard.*", "#999999", "X"),
    "integers per token": (r"int\d", "#D55E00", "^"),
    "nvfp4": (r"nvfp4", "#000000", "*"),
}


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
    window, samples, windows = options.window, options.samples, options.windows
    model, tokenizer = load_model(name, "float32")
    head_dim = model.config.get_text_config().head_dim
    recipes = [get_recipe(recipe) for recipe in options.recipes]
    recipes = [recipe for recipe in recipes if recipe.values.axis == "block" or head_dim % (recipe.values.group or 1) == 0]
    learn_from, measure_on = texts(name, options.across)
    batches = cut_windows(tokenizer, learn_from, window, samples)
    learned = calibrate_many(model, batches, [recipe for recipe in recipes if recipe.needs_calibration])
    sources: list[Any] = [next((c for c in learned if c.recipe.name == recipe.name), recipe) for recipe in recipes]
    recall = []
    if name == DEMO and options.recall_rows:
        filler = tokenizer.encode(measure_on, add_special_tokens=False, verbose=False)
        recall = [make(tokenizer, filler, 512, options.recall_rows, 0) for make in (facts, passages)]
    found = measure(model, sources, cut_windows(tokenizer, measure_on, window, windows), recall)
    return [
        asdict(row) | {"model": Path(name).name, "bits_long": bits_at(model, source, batches[:1], REFERENCE_TOKENS)}
        for row, source in zip(found, sources, strict=True)
    ]


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
            f"| `{row['recipe']}` | {row['bits_long']:.2f} | {row['perplexity_strict']:.3f} | {row['perplexity_stream']:.3f} "
            f"| {row['kld_strict']:.4f} | {row['kld_strict_p99']:.3f} | {recall} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Divergence over bits up to MOST_BITS, one panel for each model, a colour and marker for each family of recipes."""
    models = list(dict.fromkeys(row["model"] for row in found))
    plt.rcParams["svg.hashsalt"] = "narrowkv"
    figure, panels = plt.subplots(1, len(models), figsize=(5 * len(models), 5), layout="constrained", squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        shown = [row for row in found if row["model"] == model and row["kld_strict"] > 0 and row["bits_long"] <= MOST_BITS]
        for label, (pattern, colour, marker) in FAMILIES.items():
            rows = sorted((row["bits_long"], row["kld_strict"]) for row in shown if re.fullmatch(pattern, row["recipe"]))
            if rows:
                axes.plot(*zip(*rows, strict=True), color=colour, marker=marker, label=label, linewidth=1)
        axes.set(
            title=model, yscale="log", xlabel="allocated bits at 32,768 tokens", ylabel="KL divergence from 16 bit, strict"
        )
        axes.grid(True, which="major", alpha=0.3)
    panels[0][0].legend(fontsize=8, loc="upper right")
    figure.savefig(path, metadata={"Date": None})


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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    found = []
    for name in options.models:
        own_rows = rows(name, options)
        print(table(own_rows), flush=True)
        found += own_rows
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
