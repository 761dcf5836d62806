"""Accuracy on real models, in and off domain: `python -m benchmarks.real_models MODEL [MODEL ...] --out results/real`.

Tables are learned from the built-in mix, as `narrowkv calibrate` does where it is given no text, from encyclopedia text alone
(16 windows of WikiText-2's validation part) and from source code alone (as many). All are scored on windows of WikiText-2's
test part and of other source code: the figures of `narrowkv compare`, one file for each model, tables and text, which goes on
where it was interrupted. Source code is that of the running Python's own library; WikiText-2 is read from NARROWKV_ASSETS, or
as --learn and --score say.
"""

import argparse
import os
import sysconfig
from dataclasses import asdict
from pathlib import Path

from narrowkv import calibrate_many, get_recipe, load_model
from narrowkv.defaults import MIX, MIX_SAMPLES
from narrowkv.evaluate.compare import KIND, CompareOptions, compare
from narrowkv.evaluate.results import ResultFile
from narrowkv.evaluate.sources import read_text
from narrowkv.evaluate.windows import cut_windows

TEXTS = Path(os.environ.get("NARROWKV_ASSETS", Path(__file__).parents[2] / "shared" / "assets")) / "text"
RECIPES = (
    *("narrow4", "narrow3", "narrow2", "nuq4-1%", "nuq3-1%", "nuq2-1%"),
    *("kivi-4", "kivi-2", "int4", "hadamard-int4", "nvfp4"),
)
LEARNED_CODE = ("argparse", "ast", "datetime", "difflib", "doctest", "inspect", "optparse", "pickle", "tarfile", "typing")
SCORED_CODE = ("_pydecimal", "mailbox", "subprocess", "zipfile")
TABLES = ("mix", "encyclopedia", "code")
WINDOW, SAMPLES, SPREAD = 512, 16, 8


def code(modules: tuple[str, ...]) -> str:
    """The source of modules of Python's library."""
    library = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((library / f"{module}.py").read_text(encoding="utf-8") for module in modules)


def measure(name: str, options: argparse.Namespace) -> None:
    """All recipes on one model: a file of figures for each kind of tables and of text."""
    model, tokenizer = load_model(name, "float32")
    recipes = [get_recipe(recipe) for recipe in options.recipes]
    learn = {
        "mix": (read_text(MIX), MIX_SAMPLES),
        "encyclopedia": (read_text(options.learn), SAMPLES),
        "code": (code(LEARNED_CODE), SAMPLES),
    }
    score = {"encyclopedia": read_text(options.score), "code": code(SCORED_CODE)}
    chosen = CompareOptions(
        window=WINDOW,
        limit=options.windows,
        spread=SPREAD,
        samples=SAMPLES,
        decode_steps=0,
        recall_distance=0,
        backend=options.backend,
    )
    for tables, (text, samples) in learn.items():
        if tables not in options.tables:
            continue
        asked = [recipe for recipe in recipes if recipe.needs_calibration or tables == "mix"]
        files = {kind: result_file(name, tables, kind, chosen, options.out) for kind in score}
        missing = [recipe for recipe in asked if any(file.find(recipe=recipe.name) is None for file in files.values())]
        batches = cut_windows(tokenizer, text, WINDOW, samples).split(1)
        learning = [recipe for recipe in missing if recipe.needs_calibration]
        learned = calibrate_many(model, batches, learning) if learning else []
        for kind, results in files.items():
            wanted = [tables for tables in learned if results.find(recipe=tables.recipe.name) is None]
            compare(model, tokenizer, asked, score[kind], None, chosen, results, calibrations=wanted)
            show(results)


def result_file(name: str, tables: str, text: str, chosen: CompareOptions, folder: Path) -> ResultFile:
    """Where the figures of one model, for tables and a text of some kind, are kept."""
    model = Path(name).name
    settings = {"model": model, "tables": tables, "text": text, **asdict(chosen)}
    return ResultFile(folder / f"{model}-{tables}-{text}.json", KIND, f"python -m benchmarks.real_models {model}", settings)


def show(results: ResultFile) -> None:
    """Print what a file holds."""
    for row in results.rows:
        if "kld_strict" in row:
            figures = f"{row['bits_per_element']:6.2f} bits  KLD {row['kld_strict']:.4f}  {row['perplexity_strict']:.2f}"
            print(f"{results.path.stem:45} {row['recipe']:15} {figures} ({row['perplexity_fp']:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models, or hub ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which text they are learned from")
    parser.add_argument("--windows", type=int, default=2, help="scored of each text")
    parser.add_argument("--learn", default=str(TEXTS / "wikitext2-valid.tokens.txt"))
    parser.add_argument("--score", default=str(TEXTS / "wikitext2-test.raw.txt"))
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    for name in options.models:
        measure(name, options)


if __name__ == "__main__":
    main()
