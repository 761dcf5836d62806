"""`narrowkv report`: all metrics of one model on one page."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from narrowkv.cli import ablate, compare, inspect, plan, tasks
from narrowkv.cli.common import err, listed, note_mix, out, texts_to_learn, texts_to_score
from narrowkv.cli.options import (
    BackendOption,
    CalibrationTextOption,
    DeviceOption,
    DtypeOption,
    FolderOption,
    ModelArgument,
    ScoredTextOption,
    WindowOption,
)
from narrowkv.defaults import AUTO
from narrowkv.errors import ReportError, TextError
from narrowkv.files import write_atomically

if TYPE_CHECKING:
    from narrowkv.report.page import Part

PAGE = "report.html"


@dataclass(frozen=True)
class Options:
    """The options of a report; like those of the command."""

    model: str
    folder: Path
    text: list[str]
    calibration_text: list[str]
    window: int
    memory: str
    gpus: int
    quick: bool
    running: dict[str, Any]  # dtype, device and backend

    @property
    def texts(self) -> dict[str, Any]:
        return {"text": self.text, "calibration_text": self.calibration_text, **self.running}


def _plan(options: Options) -> None:
    plan.plan(options.model, options.folder, memory=options.memory, gpus=options.gpus, dtype=options.running["dtype"])


def _compare(options: Options) -> None:
    less: dict[str, Any] = {"limit": 2, "samples": 8}
    if options.quick:
        less = {"limit": 1, "samples": 4, "decode_steps": 4, "recall_rows": 8}
    compare.compare(options.model, options.folder, window=options.window, **less, **options.texts)


def _tasks(options: Options) -> None:
    lengths = ",".join(str(options.window // part) for part in ((4, 1) if options.quick else (4, 2, 1)))
    less: dict[str, Any] = {"rows": 4, "samples": 4, "recipes": "narrow3,narrow2,int2"} if options.quick else {"samples": 8}
    tasks.tasks(options.model, options.folder, window=options.window, lengths=lengths, **less, **options.texts)


def _ablate(options: Options) -> None:
    less: dict[str, Any] = {"bits": "3", "limit": 2, "samples": 4} if options.quick else {}
    ablate.ablate(options.model, options.folder, window=min(options.window, 512), **less, **options.texts)


def _inspect(options: Options) -> None:
    looked_at: dict[str, Any] = {
        "text": options.calibration_text,
        "window": options.window,
        "samples": 1 if options.quick else 4,
    }
    inspect.inspect(options.model, options.folder, **looked_at, **options.running)


@dataclass(frozen=True)
class Kind:
    """One kind of results. measure: adds what its file, `<kind>.json`, lacks; `report/<kind>.py` draws its contents."""

    title: str
    measure: Callable[[Options], None]


KINDS = {
    "plan": Kind("What fits", _plan),
    "compare": Kind("What recipes cost", _compare),
    "tasks": Kind("Long-context tasks", _tasks),
    "ablate": Kind("What each idea gains", _ablate),
    "inspect": Kind("What is quantized", _inspect),
}


def report(
    model: ModelArgument,
    folder: FolderOption,
    only: Annotated[str, typer.Option(help="Kinds of results, separated by commas.")] = ",".join(KINDS),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples: less exact metrics, sooner.")] = False,
    text: ScoredTextOption = None,
    calibration_text: CalibrationTextOption = None,
    window: WindowOption = 2048,
    memory: Annotated[str, typer.Option(help="Memory of each GPU, for the plan.")] = "80GB",
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, for the plan.")] = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
) -> None:
    """Run all measurements on a model and write one page, `report.html`, next to the metrics; resumes interrupted runs."""
    from narrowkv.report.page import render

    chosen = _chosen(only)
    running = {"dtype": dtype, "device": device, "backend": backend}
    scored = texts_to_score(model, text)
    if not scored and chosen != ["plan"]:
        raise TextError("A report needs a text; give one with --text FILE.")
    note_mix(model, calibration_text, chosen != ["plan"])
    options = Options(model, folder, scored, texts_to_learn(model, calibration_text), window, memory, gpus, quick, running)
    for i, name in enumerate(chosen):
        err.print(f"[bold]{name}[/bold], {i + 1} of {len(chosen)}", highlight=False)
        KINDS[name].measure(options)
    page = folder / PAGE
    written = render(model, [_part(folder, name) for name in chosen])
    write_atomically(page, lambda temporary: temporary.write_text(written, encoding="utf-8"))
    out.print(f"\n[bold]{escape(str(page))}[/bold] shows all of this on one page.", highlight=False, soft_wrap=True)


def _chosen(only: str) -> list[str]:
    """Kinds in the order of the page; raises ReportError where there is one that does not exist."""
    names = listed(only)
    if unknown := [name for name in names if name not in KINDS]:
        raise ReportError(f"There are no metrics of {unknown[0]!r}; there are {', '.join(KINDS)}.")
    return [name for name in KINDS if name in names]


def _part(folder: Path, name: str) -> "Part":
    from narrowkv.evaluate.results import read_result
    from narrowkv.report.page import Part

    path = folder / f"{name}.json"
    result = read_result(path, name)
    drawn = import_module(f"narrowkv.report.{name}")
    return Part(name, KINDS[name].title, path.name, result, drawn.sections(result))
