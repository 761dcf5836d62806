"""Claims: sentences, tables and plots of the pages, with the commands by which their figures were measured.

`results/claims.json` holds them as plain data. A *run* is a command and the file of results that it writes; a *figure* is
computed from entries of such files; a *claim* says which page states it. Commands are never given to a shell.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from narrowkv.errors import FileFormatError
from narrowkv.evaluate.figures import Figure, Rows, entries, read_figure, require
from narrowkv.evaluate.results import read_result
from narrowkv.files import read_json

FORMAT, FORMAT_VERSION = "narrowkv-claims", 1
FILE = Path("results") / "claims.json"
IN_CI, HERE, GPU = STATUSES = ("replayed in CI", "replayed here", "needs a GPU")
OUT, MODELS = "{out}", "{models}"  # in commands: the folder to write into, and that of real models
NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
BENCHMARK = re.compile(r"benchmarks\.[a-z0-9_]+")
WORD = re.compile(r"[\w.,:%/=@+ -]+", re.ASCII)
OUTSIDE = re.compile(r"(^|[=,:])/(?!/)|(^|[=,:/])\.\.(/|$)")  # a path that leaves the clone
FIGURE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Run:
    """A command, the file that it writes below the folder {out}, and the committed copy of that file.

    here: the short form of the command, or the command itself where that is short. status: one of STATUSES.
    """

    name: str
    command: str
    here: str
    writes: str
    result: str
    status: str

    def __post_init__(self) -> None:
        """Raises FileFormatError for commands that are not ours, paths that leave their folder, or another status."""
        require(NAME.fullmatch(self.name), f"the run {self.name!r} has a name that is not of small letters")
        require(self.status in STATUSES, f"the run {self.name} has the status {self.status!r}, not one of {STATUSES}")
        for path in (self.writes, self.result):
            require(_is_inside(path), f"the run {self.name} names the file {path!r} outside of its folder")
        for command in (self.command, self.here):
            require(OUT in command, f"the run {self.name} has a command that does not write into {OUT}")
            split_command(command)

    def models(self) -> list[str]:
        """Names of the folders of real models that it reads."""
        return [word.removeprefix(f"{MODELS}/") for word in split_command(self.command) if word.startswith(f"{MODELS}/")]


@dataclass(frozen=True)
class Claim:
    """A statement of a page: a sentence with its figures' names in braces, the table of a block, or a plot.

    block: the marks between which a table stands; a sentence stands between marks of the claim's own name. plot: its file.
    """

    name: str
    page: str
    sentence: str
    figures: dict[str, Figure]
    block: str | None
    plot: str | None

    def __post_init__(self) -> None:
        """Raises FileFormatError for names without a figure and for paths that leave the clone."""
        require(NAME.fullmatch(self.name), f"the claim {self.name!r} has a name that is not of small letters")
        for path in (self.page, self.plot or self.page):
            require(_is_inside(path), f"the claim {self.name} names the file {path!r} outside of the clone")
        missing = set(FIGURE.findall(self.sentence)) - self.figures.keys()
        require(not missing, f"the claim {self.name} has no figures {', '.join(sorted(missing))}")

    @property
    def is_sentence(self) -> bool:
        """Whether the page has it between marks of its own name."""
        return self.block is None and self.plot is None

    def written(self, results: Mapping[str, Rows]) -> str:
        """The sentence with its figures; raises FileFormatError where one cannot be computed from the results."""

        def shown(match: re.Match[str]) -> str:
            figure = self.figures[match[1]]
            (value,) = figure.values(results)
            require(value is not None, f"the figure {match[1]} of the claim {self.name} lacks rows", "measure them")
            return figure.shown(value or 0.0)

        return FIGURE.sub(shown, self.sentence)


@dataclass(frozen=True)
class Claims:
    """All claims of a clone, and the runs by which they were measured."""

    root: Path
    runs: dict[str, Run]
    claims: dict[str, Claim]

    def runs_of(self, claim: Claim) -> list[Run]:
        """The runs that it is computed from, in the order of the file."""
        needed = {run for figure in claim.figures.values() for run in figure.runs()}
        return [run for name, run in self.runs.items() if name in needed]

    def status(self, claim: Claim) -> str:
        """That of its run that is hardest to replay."""
        return max((run.status for run in self.runs_of(claim)), key=STATUSES.index)

    def result(self, run: Run) -> dict[str, Any]:
        """The committed file of results of a run."""
        return read_result(self.root / run.result)

    def rows(self, claim: Claim) -> dict[str, Rows]:
        """The committed rows of its runs."""
        return {run.name: self.result(run)["rows"] for run in self.runs_of(claim)}


def split_command(command: str) -> tuple[str, ...]:
    """A command's words.

    Raises FileFormatError for anything but `narrowkv ...` and `python -m benchmarks.NAME ...`, for characters that mean
    something to a shell, and for paths that leave the clone.
    """
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise FileFormatError(f"The command {command!r} is damaged ({error}); write its quotes in pairs.") from error
    ours = words[:1] == ("narrowkv",) or (words[:2] == ("python", "-m") and BENCHMARK.fullmatch("".join(words[2:3])))
    require(ours, f"{command!r} is neither `narrowkv ...` nor `python -m benchmarks.NAME ...`")
    for word in words:
        plain = word.replace(OUT, "out").replace(MODELS, "models")
        safe = WORD.fullmatch(plain) and not OUTSIDE.search(plain)
        require(safe, f"the word {word!r} of {command!r} is not a plain option, name or path within the clone")
    return words


def find_root(start: Path) -> Path:
    """The clone around a folder; raises FileFormatError where there is none."""
    for folder in (start, *start.parents):
        if (folder / FILE).is_file() and (folder / "benchmarks").is_dir():
            return folder
    raise FileFormatError(f"{start} is in no clone of NarrowKV with {FILE}; clone the repository and run the command in it.")


def read_claims(root: Path) -> Claims:
    """The claims of a clone; raises FileFormatError for anything that is not one."""
    found = read_json(root / FILE)
    fits = found.get("format") == FORMAT and found.get("format_version") == FORMAT_VERSION
    require(fits, f"{FILE} is not a file of claims of this version", "write it as CONTRIBUTING.md says")
    fields = entries(str(FILE), found, {"format": str, "format_version": int, "runs": dict, "claims": dict})
    runs = {name: _read_run(name, run) for name, run in fields["runs"].items()}
    return Claims(root, runs, {name: _read_claim(name, claim, runs) for name, claim in fields["claims"].items()})


def _read_run(name: str, found: Any) -> Run:
    required = {"command": str, "writes": str, "result": str, "status": str}
    fields = entries(f"the run {name}", found, required, {"here": (str, None)})
    return Run(name, **{**fields, "here": found.get("here", fields["command"])})


def _read_claim(name: str, found: Any, runs: Mapping[str, Run]) -> Claim:
    where = f"the claim {name}"
    optional = {"block": (str, None), "plot": (str, None), "tolerance": (float, 0.0), "tolerance_here": (float, 0.0)}
    fields = entries(where, found, {"page": str, "sentence": list, "figures": dict}, optional)
    require(all(isinstance(line, str) for line in fields["sentence"]), f"the lines of {where} are not all text")
    require(fields["figures"], f"{where} has no figures")
    tolerances = {kind: fields[kind] for kind in ("tolerance", "tolerance_here")}
    figures = {key: read_figure(f"the figure {key} of {where}", one, tolerances) for key, one in fields["figures"].items()}
    unknown = {run for figure in figures.values() for run in figure.runs()} - runs.keys()
    require(not unknown, f"{where} names runs that there are not, {', '.join(sorted(unknown))}")
    return Claim(name, fields["page"], "\n".join(fields["sentence"]), figures, fields["block"], fields["plot"])


def _is_inside(path: str) -> bool:
    """Whether a path is below the folder that it is relative to."""
    parts = PurePosixPath(path).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and "\0" not in path
