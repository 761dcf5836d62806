"""Options that several commands share, and checks of output files and folders before anything is computed."""

import contextlib
import math
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from narrowkv.defaults import MIX, MIX_SAMPLES, MIX_WINDOW, RECIPE, SAMPLES, WINDOW
from narrowkv.errors import OutputError


def folder_to_write(given: str) -> Path:
    """A folder that can be written to; raises OutputError otherwise, before anything is computed."""
    path = Path(given)
    if not given.strip():
        raise OutputError("The folder to write into has no name; give one with --out FOLDER.")
    if os.path.exists(path) and not os.path.isdir(path):
        raise OutputError(f"{path} is a file, and what is written needs a folder; name another one with --out.")
    _try_writing(path, path)
    return path


def file_to_write(given: str) -> Path:
    """A file that can be written; raises OutputError otherwise, before anything is computed."""
    path = Path(given)
    if not given.strip() or os.path.isdir(path):
        raise OutputError(f"{given!r} is not the name of a file that can be written; give one with --json FILE.")
    _try_writing(path.parent, path)
    return path


def _try_writing(folder: Path, target: Path) -> None:
    """Open an unnamed file in the folder, or in the nearest one that exists."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # names may be too long
        there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror}; choose a folder that is writable.") from error


ModelArgument = Annotated[
    str, typer.Argument(help="A local folder, a hub id, a .gguf file, or narrowkv://demo.", metavar="MODEL")
]
RecipeOption = Annotated[
    str | None, typer.Option(help="A recipe's name or a JSON file, see `narrowkv recipes`.", show_default=RECIPE)
]
CalibrationOption = Annotated[Path | None, typer.Option(help="A folder that `narrowkv calibrate` wrote.")]
CalibrationsOption = Annotated[
    list[Path] | None,
    typer.Option("--calibration", help="A folder that `narrowkv calibrate` wrote; repeat for several recipes."),
]
CalibrationTextOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Text to calibrate on if there is no calibration: a file or a data set; several share --samples.",
        show_default=MIX,
    ),
]
ScoredTextOption = Annotated[
    list[str] | None,
    typer.Option("--text", help="Text to score: a file or a data set's name; several share the windows."),
]
LearnedTextOption = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="A text file or a data set's name; several share the windows, and a mix is best.",
        show_default=MIX,
    ),
]
SpreadOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Spread this many windows over the text and score the first --limit of them.", show_default="--limit"
    ),
]
BosOption = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos", help="Start windows with the beginning-of-text token.", show_default="as the tokenizer does"
    ),
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
BackendOption = Annotated[
    str,
    typer.Option(
        help="Attention backend: auto, cpu, cuda, torch, naive, or dense for models that compute attention themselves."
    ),
]
WindowOption = Annotated[int, typer.Option(min=2, help="Tokens per sequence.")]
SamplesOption = Annotated[int, typer.Option(min=1, help="Sequences to calibrate on.")]
LearnedWindowOption = Annotated[
    int | None, typer.Option("--window", min=2, help="Tokens per sequence.", show_default=f"{WINDOW}, of the mix {MIX_WINDOW}")
]
LearnedSamplesOption = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Sequences to calibrate on.", show_default=f"{SAMPLES}, of the mix {MIX_SAMPLES}"),
]
FolderOption = Annotated[
    Path,
    typer.Option(
        "--out",
        parser=folder_to_write,
        metavar="FOLDER",
        help="Folder for metrics and plots; an interrupted run is resumed.",
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", parser=file_to_write, metavar="FILE", help="Also write the metrics to this file."),
]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


TemperatureOption = Annotated[float, typer.Option(min=0.0, callback=_finite, help="Sampling temperature; 0 is greedy.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed.")]
