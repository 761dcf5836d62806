"""Claims replayed: their commands run again, and their figures computed from what was found and compared."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from narrowkv.errors import NarrowKVError, OutputError
from narrowkv.evaluate.claims import GPU, MODELS, OUT, Claim, Claims, Run, split_command
from narrowkv.evaluate.figures import EACH, Figure, Rows, deviation
from narrowkv.evaluate.results import read_result
from narrowkv.files import read_json, write_json

STAMP, LOG = "replay.json", "output.txt"
CODE = ("src", "cpp", "benchmarks")  # what a result depends on: a replay of other code is made again
OK, DIFFERS, SKIPPED = "ok", "differs", "skipped"


@dataclass(frozen=True)
class Outcome:
    """What became of a figure of a claim: ok, differs or skipped.

    claimed, found, tolerance: as they are printed. why: the reason if the two were not compared.
    """

    claim: str
    figure: str
    verdict: str
    claimed: str = ""
    found: str = ""
    tolerance: str = ""
    why: str = ""


@dataclass(frozen=True)
class Replayed:
    """Rows that a run has found anew, or why there are none. failed: whether it was tried."""

    rows: Rows | None = None
    why: str = ""
    failed: bool = False


@dataclass
class Replay:
    """Runs in short or full form, each once.

    out: the folder of replays; what is complete there is not run again. models: the folder of real models, if there is one.
    on_run: called with a command before it runs.
    """

    claims: Claims
    out: Path
    here: bool
    models: Path | None = None
    on_run: Callable[[str], None] = lambda command: None
    _made: dict[str, Replayed] = field(default_factory=dict)

    def outcomes(self, claim: Claim) -> Iterator[Outcome]:
        """Of every figure of a claim, after its runs."""
        figures = {name: figure for name, figure in claim.figures.items() if figure.here or not self.here}
        for name in claim.figures.keys() - figures.keys():
            yield Outcome(claim.name, name, SKIPPED, why="it is no part of the short form")
        committed = self.claims.rows(claim)
        for name, figure in figures.items():
            made = {run: self._run(self.claims.runs[run]) for run in sorted(figure.runs())}
            missing = [one for one in made.values() if one.rows is None]
            if missing:
                verdict = DIFFERS if any(one.failed for one in missing) else SKIPPED
                yield Outcome(claim.name, name, verdict, why=missing[0].why)
                continue
            found = {run: one.rows for run, one in made.items() if one.rows is not None}
            yield compare(claim.name, name, figure, figure.values(committed), figure.values(found), self.here)

    def _run(self, run: Run) -> Replayed:
        if run.name not in self._made:
            why = self._unsupported(run)
            self._made[run.name] = Replayed(why=why) if why else self._make(run)
        return self._made[run.name]

    def _unsupported(self, run: Run) -> str:
        """Why a run cannot be made on this machine, or nothing."""
        if run.status == GPU and not torch.cuda.is_available():
            return "it needs a GPU"
        for name in run.models():
            if self.models is None:
                return f"it needs the model {name}; name the folder of models by --models or NARROWKV_MODELS"
            if not (self.models / name).exists():
                return f"the model {self.models / name} does not exist"
        return ""

    def _make(self, run: Run) -> Replayed:
        """Run a command, unless its result is complete, and read what it wrote."""
        folder = self.out / ("here" if self.here else "full") / run.name
        command = run.here if self.here else run.command
        stamp = {"command": command, "code": code_checksum(self.claims.root)}
        done = _stamp(folder)
        if done != {**stamp, "complete": True}:
            if done != {**stamp, "complete": False}:
                _clear(folder)
            write_json(folder / STAMP, {**stamp, "complete": False})
            self.on_run(command)
            status = execute(self.claims.root, command, folder, self.models)
            if status:
                return Replayed(why=f"its command ended with status {status}; see {folder / LOG}", failed=True)
        try:
            rows = read_result(folder / run.writes)["rows"]
        except NarrowKVError as error:
            return Replayed(why=str(error).rstrip("."), failed=True)
        write_json(folder / STAMP, {**stamp, "complete": True})
        return Replayed(rows)


def compare(
    claim: str, name: str, figure: Figure, claimed: list[float | None], found: list[float | None], here: bool
) -> Outcome:
    """A figure computed from committed results and from replayed ones, where the two differ most.

    The short form may have some of EACH alone; all else must be there.
    """
    tolerance = figure.tolerance_here if here else figure.tolerance
    pairs = [(a, b) for a, b in zip(claimed, found, strict=True) if a is not None and b is not None]
    if not pairs or (len(pairs) < len(claimed) and not (here and figure.how == EACH)):
        lacking = "committed" if None in claimed else "replayed"
        return Outcome(claim, name, DIFFERS, why=f"the {lacking} results lack rows")
    worst = max(pairs, key=lambda pair: deviation(*pair))
    verdict = OK if deviation(*worst) <= tolerance else DIFFERS
    return Outcome(claim, name, verdict, figure.shown(worst[0]), figure.shown(worst[1]), f"{100 * tolerance:g}%")


def execute(root: Path, command: str, folder: Path, models: Path | None) -> int:
    """Run a command of ours in a clone, without a shell, and return its exit status; what it prints goes to a file.

    folder, models: what {out} and {models} stand for.
    """
    words = split_command(command)
    options = words[1:] if words[0] == "python" else ("-m", *words)
    filled = [word.replace(OUT, str(folder.absolute())) for word in options]
    if models is not None:
        filled = [word.replace(MODELS, str(models.absolute())) for word in filled]
    with (folder / LOG).open("w", encoding="utf-8") as log:
        return subprocess.run(
            [sys.executable, *filled], cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        ).returncode


def code_checksum(root: Path) -> str | None:
    """Git's checksums of the code that results depend on, as it was committed; None without git."""
    asked = ["git", "-C", str(root), "rev-parse", *(f"HEAD:{folder}" for folder in CODE)]
    try:
        found = subprocess.run(asked, capture_output=True, text=True)
    except OSError:
        return None
    return " ".join(found.stdout.split()) if found.returncode == 0 else None


def _stamp(folder: Path) -> dict[str, Any] | None:
    """What a folder of a replay says of it; None where it is none."""
    try:
        return read_json(folder / STAMP)
    except NarrowKVError:
        return None


def _clear(folder: Path) -> None:
    """Remove a replay of another command or of other code; raises OutputError for what is no replay."""
    if not folder.exists():
        return
    if _stamp(folder) is None:
        raise OutputError(f"{folder} holds no replay; name another folder with --out.")
    rmtree(folder)
