"""What the commands share: options, progress bars, and finding the tables that a recipe needs.

Commands import torch, transformers and what needs them when they run, so that help and mistakes are told at once.
"""

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from narrowkv.defaults import AUTO, DEMO, RECIPE
from narrowkv.errors import RecipeError, TextError
from narrowkv.report import figures, sections

if TYPE_CHECKING:
    from narrowkv.calibration import Calibration
    from narrowkv.evaluate import Quality
    from narrowkv.methods import Recipe

WIDTH = 160  # of tables that do not go to a terminal

GIVEN: ContextVar[Sequence[str]] = ContextVar("GIVEN", default=())  # arguments of the command that runs

out = Console()
err = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="A local folder, a hub id, or narrowkv://demo.", metavar="MODEL")]
RecipeOption = Annotated[
    str | None, typer.Option(help="A recipe's name or a JSON file, see `narrowkv recipes`.", show_default=RECIPE)
]
CalibrationOption = Annotated[Path | None, typer.Option(help="A folder that `narrowkv calibrate` wrote.")]
CalibrationTextOption = Annotated[
    str | None, typer.Option(help="Text to calibrate on first, where there is no calibration: a file or a data set's name.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
BackendOption = Annotated[
    str,
    typer.Option(
        help="Which attention runs: auto, cpu (compiled), torch, naive, or dense for models that compute it by themselves."
    ),
]
WindowOption = Annotated[int, typer.Option(min=2, help="Tokens per sequence.")]
SamplesOption = Annotated[int, typer.Option(min=1, help="Sequences to calibrate on.")]
FolderOption = Annotated[
    Path, typer.Option("--out", help="Folder for figures and pictures; a run that was interrupted goes on.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


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
    return integrations.load_model(name, dtype, device)


def silence_transformers() -> None:
    """No bars and warnings of transformers: a command has its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def default_text(model: str, text: str | None, built_in: str) -> str | None:
    """The text that was named, or for the built-in model the built-in one."""
    return built_in if text is None and model == DEMO else text


def learn(
    model: Any, tokenizer: Any, recipes: "list[Recipe]", text: str, window: int, samples: int, backend: str = AUTO
) -> "list[Calibration]":
    """Calibrate on the first windows of a text, with a progress bar. Under torchrun the processes share the windows."""
    from narrowkv.calibration.processes import join_processes
    from narrowkv.evaluate import cut_windows
    from narrowkv.evaluate.sources import read_text
    from narrowkv.integrations import calibrate_many

    batches = cut_windows(tokenizer, read_text(text), window, samples).split(1)
    group, rank, size = join_processes(model.device.type)
    if len(batches) < size:
        raise TextError(f"{len(batches)} sequences are too few for {size} processes; give more text, or start fewer.")
    with progress("calibrating") as advance:
        return calibrate_many(model, batches[rank::size], recipes, backend=backend, group=group, on_batch=advance)


def find_source(
    model: Any,
    tokenizer: Any,
    recipe: str | None,
    calibration: Path | None,
    text: str | None,
    window: int,
    samples: int,
    backend: str,
) -> "Calibration | Recipe":
    """The calibration in a folder, or the recipe, calibrated first on `text` if it needs that and a text is given."""
    from narrowkv.calibration import Calibration
    from narrowkv.methods import get_recipe

    if calibration is not None:
        if recipe is not None:
            raise RecipeError("A calibration has its own recipe; give either --calibration or --recipe.")
        return Calibration.from_pretrained(calibration, model)
    chosen = get_recipe(recipe or RECIPE)
    if chosen.needs_calibration and text is not None:
        return learn(model, tokenizer, [chosen], text, window, samples, backend)[0]
    chosen.quantizers(0)  # a recipe that lacks its calibration says so
    return chosen


def quality_table(rows: "list[Quality]", title: str) -> Table:
    """The figures of several recipes as a table."""
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
    """What the table's columns mean, with the figures that all rows share."""
    first = rows[0]
    recall = "" if first.recall_fp is None else f", recall {first.recall_fp:.0%}"
    return (
        f"{first.tokens:,} tokens in windows of {first.window}; unquantised perplexity {first.perplexity_fp:.3f}{recall}.\n"
        "bits: allocated for each number held, everything counted. strict: every number attended to is quantised.\n"
        f"stream: chunks of {first.stream_chunk} tokens attend exactly to themselves and to the packed past."
    )


def listed(names: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in names.split(",")]


def command_line() -> str:
    """The command as it was given, for files of figures."""
    return shlex.join(["narrowkv", *GIVEN.get()])


def show_sections(shown: list[sections.Section], folder: Path, kind: str) -> None:
    """Print each section's text and tables, and draw its pictures as `FOLDER/<kind>-<name>.svg`."""
    wide = out if out.is_terminal else Console(width=WIDTH)
    for section in shown:
        out.print(f"\n[bold]{escape(section.title)}[/bold]\n{escape(section.text)}", highlight=False)
        for table in section.tables:
            wide.print(section_table(table))
        for picture in section.pictures:
            path = folder / f"{kind}-{picture.name}.svg"
            figures.save(picture.figure, path)
            out.print(f"{escape(str(path))}: {escape(picture.caption)}", highlight=False, soft_wrap=True)


def section_table(table: sections.Table) -> Table:
    """A section's table for the terminal: columns of numbers are aligned right."""
    printed = Table(title=escape(table.caption), title_justify="left", box=SIMPLE)
    for heading, numbers in zip(table.columns, table.numbers, strict=True):
        printed.add_column(escape(heading), justify="right" if numbers else "left")
    for row in table.rows:
        printed.add_row(*(escape(cell) for cell in table.shown(row)))
    return printed
