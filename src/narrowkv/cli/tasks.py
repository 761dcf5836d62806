"""`narrowkv tasks`: long-context tasks, for several recipes and the 16-bit cache."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowkv.cli.common import (
    command_line,
    listed,
    load_model,
    named,
    note_mix,
    progress,
    read_calibrations,
    recipes_for,
    show_sections,
    still_learn,
    texts_to_learn,
)
from narrowkv.cli.options import (
    BackendOption,
    BosOption,
    CalibrationsOption,
    CalibrationTextOption,
    DeviceOption,
    DtypeOption,
    FolderOption,
    ModelArgument,
    SamplesOption,
    SeedOption,
    WindowOption,
)
from narrowkv.defaults import AUTO, NEW_TOKENS, TASK_DEPTHS, TASK_LENGTHS, TASK_ROWS, TASKS
from narrowkv.errors import TextError

LENGTHS, DEPTHS = (",".join(f"{number:g}" for number in parsed) for parsed in (TASK_LENGTHS, TASK_DEPTHS))
TEXT = "narrowkv://held-out"
RECIPES = "narrow3,narrow2,nuq2-1%,int2"


def tasks(
    model: ModelArgument,
    out: FolderOption,
    recipes: Annotated[
        str | None, typer.Option(help="Names of recipes or JSON files, separated by commas.", show_default=RECIPES)
    ] = None,
    calibration: CalibrationsOption = None,
    wanted: Annotated[str, typer.Option("--tasks", help=f"Tasks among {', '.join(TASKS)}; `none` for files only.")] = ",".join(
        TASKS
    ),
    lengths: Annotated[str, typer.Option(help="Lengths of the rows in tokens, separated by commas.")] = LENGTHS,
    depths: Annotated[str, typer.Option(help="Depths of the passkey from 0 to 1, separated by commas.")] = DEPTHS,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each task, length and depth.")] = TASK_ROWS,
    file: Annotated[list[Path] | None, typer.Option(help="JSON lines of LongBench or RULER; can be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of questions of each file at most.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for a question of a file.")] = NEW_TOKENS,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text into which facts are inserted: a file or a data set's name; can be repeated.", show_default=TEXT
        ),
    ] = None,
    calibration_text: CalibrationTextOption = None,
    window: WindowOption = 2048,
    samples: SamplesOption = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
    bos: BosOption = None,
    seed: SeedOption = 0,
) -> None:
    """Run long-context tasks: passkey by depth and length, key-value recall, needles, variable tracking, counting, files."""
    from narrowkv.evaluate import tasks as tasking
    from narrowkv.evaluate.results import ResultFile, read_result
    from narrowkv.evaluate.sources import read_texts
    from narrowkv.report.tasks import sections

    finished = read_calibrations(calibration)
    chosen = recipes_for(recipes, finished, RECIPES)
    options = tasking.TaskOptions(
        tasks=() if wanted == "none" else tuple(listed(wanted)),
        lengths=_parse_list(lengths, "--lengths", int, 1, 2**31),
        depths=_parse_list(depths, "--depths", float, 0, 1),
        rows=rows,
        window=window,
        samples=samples,
        new_tokens=new_tokens,
        limit=limit,
        backend=backend,
        bos=bos,
    )
    filler_texts, learned = text or [TEXT], texts_to_learn(model, calibration_text)
    settings = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "text": named(filler_texts),
        "calibration_text": named(learned),
    }
    path = out / f"{tasking.KIND}.json"
    results = ResultFile(path, tasking.KIND, command_line(), settings | options.settings(), seed)
    words, learn_from = read_texts(filler_texts), read_texts(learned)
    loaded, tokenizer = load_model(model, dtype, device)
    note_mix(model, calibration_text, still_learn(chosen, finished))
    with progress("query_positions") as advance:
        tasking.run_tasks(loaded, tokenizer, chosen, words, learn_from, options, results, file or (), advance, finished)
    show_sections(sections(read_result(path)), out, tasking.KIND)


def _parse_list(given: str, option: str, kind: Callable[[str], Any], least: float, most: float) -> tuple[Any, ...]:
    """Elements separated by commas; raises TextError if one is invalid or out of bounds."""
    parsed: tuple[Any, ...] = ()
    with contextlib.suppress(ValueError):
        parsed = tuple(kind(part) for part in given.split(","))
    if not parsed or not all(least <= number <= most for number in parsed):
        raise TextError(f"{option} takes elements from {least:,} to {most:,} separated by commas, not {given!r}.")
    return parsed
