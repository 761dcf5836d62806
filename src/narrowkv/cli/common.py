"""What the commands share: models, texts, tables, progress bars, and finding the calibrations that a recipe needs.

Commands import torch, transformers and what needs them when they run, so that help and mistakes come at once.
"""

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from narrowkv.defaults import AUTO, DEMO, MIX, MIX_SAMPLES, MIX_WINDOW, RECIPE, SAMPLES, WINDOW
from narrowkv.errors import RecipeError, TextError
from narrowkv.report import plots, sections

if TYPE_CHECKING:
    from torch import Tensor

    from narrowkv.calibration import Calibration
    from narrowkv.evaluate import Quality
    from narrowkv.methods import Recipe

WIDTH = 160  # of tables that do not go to a terminal
GIVEN: ContextVar[Sequence[str]] = ContextVar("GIVEN", default=())  # arguments of the command that runs
out = Console()
err = Console(stderr=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields the function to call with (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def load_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A model and its tokenizer, as `narrowkv.load_model`, without bars and warnings of transformers."""
    from narrowkv import integrations

    silence_transformers()
    return integrations.load_model(name, dtype, device, note)


def note(sentence: str) -> None:
    """Print a remark on standard error."""
    err.print(escape(sentence), style="dim", highlight=False, soft_wrap=True)


def silence_transformers() -> None:
    """No bars and warnings of transformers: a command has its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def texts_to_score(model: str, texts: Sequence[str] | None) -> list[str]:
    """The given texts, or for the built-in model the text that it was not trained on."""
    return list(texts or (["narrowkv://held-out"] if model == DEMO else []))


def texts_to_learn(model: str, texts: Sequence[str] | None) -> list[str]:
    """The given texts, or for the built-in model its training text, or else the mix."""
    return list(texts or ["narrowkv://train" if model == DEMO else MIX])


def note_mix(model: str, texts: Sequence[str] | None, learning: bool = True) -> None:
    """Note that tables will be learned from the mix, if no text was given."""
    if learning and not texts and model != DEMO:
        note(f"No calibration text is given, so the built-in mix is used ({MIX}); your own texts may be better.")


def windows_to_learn(texts: Sequence[str], window: int | None, samples: int | None) -> tuple[int, int]:
    """Tokens per sequence and number of sequences: as given, or else the defaults for the mix or for other texts."""
    usual = (MIX_WINDOW, MIX_SAMPLES) if list(texts) == [MIX] else (WINDOW, SAMPLES)
    return window or usual[0], samples or usual[1]


def still_learn(recipes: "Sequence[Recipe]", calibrations: "Sequence[Calibration]") -> bool:
    """Whether one of the recipes learns, and its calibration is not given."""
    finished = {calibration.recipe.name for calibration in calibrations}
    return any(recipe.needs_calibration and recipe.name not in finished for recipe in recipes)


def learns(recipe: str | None, calibrations: Sequence[Path]) -> bool:
    """Whether `find_sources` learns the recipe."""
    from narrowkv.methods import get_recipe

    return not calibrations and get_recipe(recipe or RECIPE).needs_calibration


def named(texts: Sequence[str]) -> str | None:
    """The names of texts as one, for settings."""
    return " + ".join(texts) or None


def learn(
    model: Any,
    tokenizer: Any,
    recipes: "list[Recipe]",
    texts: Sequence[str],
    window: int,
    samples: int,
    backend: str = AUTO,
    bos: bool | None = None,
) -> "list[Calibration]":
    """Calibrate on windows of texts, with a progress bar; see `learn_windows`."""
    from narrowkv.evaluate import cut_windows

    return learn_windows(model, recipes, cut_windows(tokenizer, texts, window, samples, bos=bos), backend)


def learn_windows(model: Any, recipes: "list[Recipe]", windows: "Tensor", backend: str = AUTO) -> "list[Calibration]":
    """Calibrate on windows [n, tokens], with a progress bar. Under torchrun the processes share them."""
    from narrowkv.calibration.distributed import join_processes
    from narrowkv.integrations import calibrate_many

    batches = windows.split(1)
    group, rank, size = join_processes(model.device.type)
    if len(batches) < size:
        raise TextError(f"{len(batches)} sequences are too few for {size} processes; give more text, or start fewer.")
    with progress("calibrating") as advance:
        return calibrate_many(model, batches[rank::size], recipes, backend=backend, group=group, on_batch=advance)


def find_sources(
    model: Any,
    tokenizer: Any,
    recipe: str | None,
    calibrations: Sequence[Path],
    texts: Sequence[str],
    window: int,
    samples: int,
    backend: str,
    bos: bool | None = None,
) -> "list[Calibration | Recipe]":
    """The calibrations in folders, or the recipe, calibrated first on `texts` if it needs that."""
    from narrowkv.evaluate.finished import finished_for
    from narrowkv.methods import get_recipe

    if calibrations:
        if recipe is not None:
            raise RecipeError("A calibration has its own recipe; give either --calibration or --recipe.")
        read = read_calibrations(calibrations)
        return [*finished_for(model, [calibration.recipe for calibration in read], read).values()]
    chosen = get_recipe(recipe or RECIPE)
    if chosen.needs_calibration:
        return [*learn(model, tokenizer, [chosen], texts, window, samples, backend, bos)]
    return [chosen]


def read_calibrations(folders: Sequence[Path] | None) -> "list[Calibration]":
    """The calibrations in folders."""
    from narrowkv.calibration import Calibration

    return [Calibration.from_pretrained(folder) for folder in folders or ()]


def recipes_for(names: str | None, calibrations: "Sequence[Calibration]", default: str) -> "list[Recipe]":
    """The recipes that were named, or else those of the calibrations, or else the default."""
    from narrowkv.evaluate.finished import recipe_of
    from narrowkv.methods import get_recipe

    if names is None and calibrations:
        return [recipe_of(calibration) for calibration in calibrations]
    return [get_recipe(name) for name in listed(names or default)]


def quality_table(rows: "list[Quality]", title: str) -> Table:
    """The metrics of several recipes as a table."""
    table = Table(title=title, title_justify="left")
    for heading in ("recipe", "bits", "kB", "of 16 bit", "ppl strict", "ppl stream", "KLD strict", "recall"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in rows:
        table.add_row(
            row.recipe,
            f"{row.bits_per_element:.2f}",
            f"{row.nbytes / 1000:,.0f}",
            f"{row.nbytes / row.nbytes_fp16:.0%}",
            f"{row.perplexity_strict:.3f}",
            f"{row.perplexity_stream:.3f}",
            f"{row.kld_strict:.4f}",
            "-" if row.recall is None else f"{row.recall:.0%}",
        )
    return table


def quality_caption(rows: "list[Quality]") -> str:
    """What the table's columns mean, with the metrics that all rows share."""
    first = rows[0]
    recall = "" if first.recall_fp is None else f", recall {first.recall_fp:.0%}"
    return (
        f"{first.tokens:,} tokens in windows of {first.window}; unquantized perplexity {first.perplexity_fp:.3f}{recall}.\n"
        "bits: allocated per stored element, everything counted. strict: every element attended to is quantized.\n"
        f"stream: chunks of {first.stream_chunk} tokens attend exactly to themselves and to the packed past."
    )


def listed(names: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in names.split(",")]


def command_line() -> str:
    """The command as it was given, for files of results."""
    return shlex.join(["narrowkv", *GIVEN.get()])


def wide_console() -> Console:
    """Standard output, with space for tables where it is no terminal."""
    return out if out.is_terminal else Console(width=WIDTH)


def show_sections(shown: list[sections.Section], folder: Path, kind: str) -> None:
    """Print each section's text and tables, and draw its plots as `FOLDER/<kind>-<name>.svg`."""
    wide = wide_console()
    for section in shown:
        out.print(f"\n[bold]{escape(section.title)}[/bold]\n{escape(section.text)}", highlight=False)
        for table in section.tables:
            wide.print(section_table(table))
        for plot in section.plots:
            path = folder / f"{kind}-{plot.name}.svg"
            plots.save(plot.figure, path)
            out.print(f"{escape(str(path))}: {escape(plot.caption)}", highlight=False, soft_wrap=True)


def section_table(table: sections.Table) -> Table:
    """A section's table for the terminal: columns of elements are aligned right."""
    printed = Table(title=escape(table.caption), title_justify="left", box=SIMPLE)
    for heading, numeric in zip(table.columns, table.numeric, strict=True):
        printed.add_column(escape(heading), justify="right" if numeric else "left")
    for row in table.rows:
        printed.add_row(*(escape(cell) for cell in table.shown(row)))
    return printed
