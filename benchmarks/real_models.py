"""Accuracy on real models, in and off domain: `python -m benchmarks.real_models MODEL [MODEL ...] --out results/real`.

Tables are learned from the built-in mix, as `narrowkv calibrate` does where it is given no text, from encyclopedia text alone
(16 windows of WikiText-2's validation part) and from source code alone (as many). All are scored on windows of WikiText-2's
test part and of other source code, with tables of the mix on long windows too: the strict metrics of `narrowkv compare`, and
the bits of a cache of 32,768 tokens. Beside each of KVQuant's recipes stands ours with as many bits. There is one file for
each model, which goes on where it was interrupted; with `--calibrations FOLDER` tables that were learned are stored there too,
and read again. Source code is that of the running Python's own library; WikiText-2 is read from NARROWKV_ASSETS, or as --learn
and --score say.
"""

import argparse
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv import Calibration, calibrate_many, get_recipe, load_model
from narrowkv.defaults import MIX, MIX_SAMPLES, REFERENCE_TOKENS
from narrowkv.evaluate.finished import tables_checksum
from narrowkv.evaluate.perplexity import Source, filled, measure
from narrowkv.evaluate.results import ResultFile, definition
from narrowkv.evaluate.sources import read_text
from narrowkv.evaluate.windows import cut_windows
from narrowkv.methods import Recipe

KIND = "real-models"
TEXTS = Path(os.environ.get("NARROWKV_ASSETS", Path(__file__).parents[2] / "shared" / "assets")) / "text"
LEARN, SCORE = (str(TEXTS / name) for name in ("wikitext2-valid.tokens.txt", "wikitext2-test.raw.txt"))
KVQUANT = ("nuq4-1%", "nuq3-1%", "nuq2-1%")
LEARNED = ("narrow4", "narrow3", "narrow2", *KVQUANT)
RECIPES = (*LEARNED, "kivi-4", "kivi-2", "int4", "hadamard-int4", "nvfp4")
LEARNED_CODE = ("argparse", "ast", "datetime", "difflib", "doctest", "inspect", "optparse", "pickle", "tarfile", "typing")
SCORED_CODE = ("_pydecimal", "mailbox", "subprocess", "zipfile")
TABLES = ("mix", "encyclopedia", "code")
STREAMED = ("perplexity_stream", "stream_chunk")
WINDOW, LONG_WINDOW, SAMPLES, SPREAD = 512, 2048, 16, 8


@dataclass(frozen=True)
class Subject:
    """A model, the texts that are learned from, with how many windows of each, and those that are scored."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    learned: dict[str, tuple[str, int]]
    scored: dict[str, str]

    def tables(self, kind: str, recipes: Sequence[Recipe], kept: Path | None) -> dict[str, Source]:
        """Of each recipe what was learned from a kind of text, or read from the folder where that was `kept`."""
        sources: dict[str, Source] = {recipe.name: recipe for recipe in recipes}
        learning = [recipe for recipe in recipes if recipe.needs_calibration]
        folders = {recipe.name: kept / f"{self.name}-{kind}-{recipe.name}" for recipe in learning if kept}
        for recipe in learning:
            if recipe.name in folders and folders[recipe.name].exists():
                sources[recipe.name] = Calibration.from_pretrained(folders[recipe.name], self.model)
        missing = [recipe for recipe in learning if isinstance(sources[recipe.name], Recipe)]
        if missing:
            text, samples = self.learned[kind]
            batches = cut_windows(self.tokenizer, text, WINDOW, samples).split(1)
            for calibration in calibrate_many(self.model, batches, missing):
                sources[calibration.recipe.name] = calibration
                if kept:
                    calibration.save_pretrained(folders[calibration.recipe.name])
        return sources


def code(modules: tuple[str, ...]) -> str:
    """The source of modules of Python's library."""
    library = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((library / f"{module}.py").read_text(encoding="utf-8") for module in modules)


def load(name: str, learn: str = LEARN, score: str = SCORE, dtype: str = "float32") -> Subject:
    """A model and its texts."""
    model, tokenizer = load_model(name, dtype)
    learned = {
        "mix": (read_text(MIX), MIX_SAMPLES),
        "encyclopedia": (read_text(learn), SAMPLES),
        "code": (code(LEARNED_CODE), SAMPLES),
    }
    scored = {"encyclopedia": read_text(score), "code": code(SCORED_CODE)}
    return Subject(Path(name).name, model, tokenizer, learned, scored)


def at_equal_bits(row: dict[str, Any]) -> str:
    """The narrow recipe that may take as many bits, to a hundredth, as another was measured to take."""
    return f"narrow{math.floor(100 * row['bits_per_element']) / 100:.2f}"


def jobs(options: argparse.Namespace, results: ResultFile) -> Iterator[tuple[str, int, int, list[str]]]:
    """What is measured together, the dearest last: kind of tables, tokens of a window, how many windows, recipes."""
    if "mix" in options.tables:
        yield "mix", WINDOW, options.windows, options.recipes
    theirs = [name for name in KVQUANT if name in options.recipes]
    rows = [results.find(tables="mix", text="encyclopedia", window=WINDOW, recipe=name) for name in theirs]
    equal = [at_equal_bits(row) for row in rows if row]
    for tables in options.tables:
        yield tables, WINDOW, options.windows, equal if tables == "mix" else [*equal, *theirs]
    if "mix" in options.tables and options.long:
        yield "mix", LONG_WINDOW, options.long, [*equal, *(name for name in LEARNED if name in options.recipes)]


def run(name: str, options: argparse.Namespace) -> None:
    """All rows that a model's file lacks."""
    model = Path(name).name
    settings = {"model": model, "windows": options.windows, "long_windows": options.long, "context": REFERENCE_TOKENS}
    results = ResultFile(options.out / f"{model}.json", KIND, f"python -m benchmarks.real_models {model}", settings)
    subject: Subject | None = None
    for tables, size, count, recipes in jobs(options, results):
        cells = {text: {"tables": tables, "text": text, "window": size} for text in ("encyclopedia", "code")}
        missing = {
            text: [recipe for recipe in recipes if results.find(**cell, recipe=recipe) is None] for text, cell in cells.items()
        }
        wanted = [get_recipe(recipe) for recipe in recipes if any(recipe in lacking for lacking in missing.values())]
        if not wanted:
            continue
        subject = subject or load(name, options.learn, options.score)
        sources = subject.tables(tables, wanted, options.calibrations)
        for text, lacking in missing.items():
            windows = cut_windows(subject.tokenizer, subject.scored[text], size, count, spread=SPREAD)
            score(subject, cells[text], {name: sources[name] for name in lacking}, windows, results, options.backend)
    show(results)


def score(
    subject: Subject,
    found: dict[str, Any],
    sources: dict[str, Source],
    windows: Tensor,
    results: ResultFile,
    backend: str,
) -> None:
    """Add a row for each recipe on some windows; bits are those of tables, counted once."""
    if not sources:
        return
    measured = measure(subject.model, list(sources.values()), windows, stream_chunk=None, backend=backend)
    for (recipe, source), quality in zip(sources.items(), measured, strict=True):
        row = {key: figure for key, figure in quality.to_dict().items() if key not in ("recall", "recall_fp", *STREAMED)}
        counted = results.find(tables=found["tables"], recipe=recipe)
        if counted is None:
            with torch.inference_mode():
                cache = filled(subject.model, source, windows[:1], REFERENCE_TOKENS, backend)
            counted = {"bits_per_element": cache.bits_per_element, "nbytes": cache.nbytes, "nbytes_fp16": 2 * cache.elements}
        row |= {key: counted[key] for key in ("bits_per_element", "nbytes", "nbytes_fp16")}
        made_from = {"definition": definition(get_recipe(recipe)), "checksum": None}
        if isinstance(source, Calibration):
            made_from["checksum"] = tables_checksum(source)
        results.add(found | row | made_from)


def show(results: ResultFile) -> None:
    """Print what a file holds."""
    for row in results.rows:
        figures = f"{row['bits_per_element']:6.2f} bits  KLD {row['kld_strict']:.4f}  {row['perplexity_strict']:.2f}"
        where = f"{results.path.stem:20} {row['tables']:12} {row['text']:12} {row['window']:5}"
        print(f"{where} {row['recipe']:15} {figures} ({row['perplexity_fp']:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models, or hub ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which text they are learned from")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, scored of each text")
    parser.add_argument("--long", type=int, default=2, help="windows of 2,048 tokens, scored of each text")
    parser.add_argument("--calibrations", type=Path, help="folder where tables are stored")
    parser.add_argument("--learn", default=LEARN)
    parser.add_argument("--score", default=SCORE)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    for name in options.models:
        run(name, options)


if __name__ == "__main__":
    main()
