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
class Asked:
    """What a report is asked to be of; like those of the command's options."""

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


def _plan(asked: Asked) -> None:
    plan.plan(asked.model, asked.folder, memory=asked.memory, gpus=asked.gpus, dtype=asked.running["dtype"])


def _compare(asked: Asked) -> None:
    less: dict[str, Any] = {"limit": 2, "samples": 8}
    if asked.quick:
        less = {"limit": 1, "samples": 4, "decode_steps": 4, "recall_rows": 8}
    compare.compare(asked.model, asked.folder, window=asked.window, **less, **asked.texts)


def _tasks(asked: Asked) -> None:
    lengths = ",".join(str(asked.window // part) for part in ((4, 1) if asked.quick else (4, 2, 1)))
    less: dict[str, Any] = {"rows": 4, "samples": 4, "recipes": "narrow3,narrow2,int2"} if asked.quick else {"samples": 8}
    tasks.tasks(asked.model, asked.folder, window=asked.window, lengths=lengths, **less, **asked.texts)


def _ablate(asked: Asked) -> None:
    less: dict[str, Any] = {"bits": "3", "limit": 2, "samples": 4} if asked.quick else {}
    ablate.ablate(asked.model, asked.folder, window=min(asked.window, 512), **less, **asked.texts)


def _inspect(asked: Asked) -> None:
    looked_at: dict[str, Any] = {"text": asked.calibration_text, "window": asked.window, "samples": 1 if asked.quick else 4}
    inspect.inspect(asked.model, asked.folder, **looked_at, **asked.running)


@dataclass(frozen=True)
class Kind:
    """One kind of results. measure: adds what its file, `<kind>.json`, lacks; `report/<kind>.py` draws what that holds."""

    title: str
    measure: Callable[[Asked], None]


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
    only: Annotated[str, typer.Option(help="Which kind of results, separated by commas.")] = ",".join(KINDS),
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything: rougher metrics, sooner.")] = False,
    text: ScoredTextOption = None,
    calibration_text: CalibrationTextOption = None,
    window: WindowOption = 2048,
    memory: Annotated[str, typer.Option(help="Of each GPU, for the plan.")] = "80GB",
    gpus: Annotated[int, typer.Option(min=1, help="For the plan.")] = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
) -> None:
    """Measure a model in every way and write one page, `report.html`, beside the metrics; an interrupted run goes on."""
    from narrowkv.report.page import render

    chosen = _chosen(only)
    running = {"dtype": dtype, "device": device, "backend": backend}
    scored = texts_to_score(model, text)
    if not scored and chosen != ["plan"]:
        raise TextError("A report needs a text; give one with --text FILE.")
    note_mix(model, calibration_text, chosen != ["plan"])
    asked = Asked(model, folder, scored, texts_to_learn(model, calibration_text), window, memory, gpus, quick, running)
    for i, name in enumerate(chosen):
        err.print(f"[bold]{name}[/bold], {i + 1} of {len(chosen)}", highlight=False)
        KINDS[name].measure(asked)
    page = folder / PAGE
    written = render(model, [_part(folder, name) for name in chosen])
    write_atomically(page, lambda temporary: temporary.write_text(written, encoding="utf-8"))
    out.print(f"\n[bold]{escape(str(page))}[/bold] shows all of this on one page.", highlight=False, soft_wrap=True)


def _chosen(only: str) -> list[str]:
    """Kinds in the order of the page; raises ReportError where there is one that does not exist."""
    asked = listed(only)
    if unknown := [name for name in asked if name not in KINDS]:
        raise ReportError(f"There are no metrics of {unknown[0]!r}; there are {', '.join(KINDS)}.")
    return [name for name in KINDS if name in asked]


def _part(folder: Path, name: str) -> "Part":
    from narrowkv.evaluate.results import read_result
    from narrowkv.report.page import Part

    path = folder / f"{name}.json"
    result = read_result(path, name)
    drawn = import_module(f"narrowkv.report.{name}")
    return Part(name, KINDS[name].title, path.name, result, drawn.sections(result))
