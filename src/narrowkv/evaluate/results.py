"""Files of results: each says by which command, versions and seed it was made, and goes on where it was interrupted."""

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from narrowkv._version import __version__
from narrowkv.attention import BACKENDS
from narrowkv.codec.cpu.encode import INSTRUCTION_SETS
from narrowkv.errors import FileFormatError, OutputError
from narrowkv.files import checksum, read_json, write_json
from narrowkv.methods import Recipe

FORMAT, FORMAT_VERSION = "narrowkv-result", 1


def processor() -> str:
    """The processor's name, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def openmp() -> list[str]:
    """The loaded OpenMP runtimes by folder and name, if the system reports them: one if the kernels share torch's."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = {
        path.resolve()
        for path in (Path(line.split(maxsplit=5)[-1]) for line in lines)
        if path.name.startswith(("libgomp", "libomp", "libiomp"))
    }
    return sorted("/".join(path.parts[-3:]) for path in found)


def environment() -> dict[str, Any]:
    """Versions and hardware as plain data."""
    return {
        "narrowkv": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": openmp(),
        "instruction_sets": list(INSTRUCTION_SETS),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": sorted(BACKENDS),
    }


class ResultFile:
    """Rows of metrics in a JSON file that is written anew, atomically, whenever a row is added.

    rows: those of the file so far. `narrowkv report` and `make results` draw from such files alone.
    """

    def __init__(self, path: Path, kind: str, command: str, settings: dict[str, Any], seed: int = 0):
        """kind: what the rows are, such as `compare`. command: as it was given. settings: all that the metrics depend on; a
        file that is there already is continued if its kind, settings and seed are these. Raises OutputError where they differ.
        """
        self.path = path
        self.seed = seed
        self.rows: list[dict[str, Any]] = []
        self._head = _head(kind, command, settings, seed)
        if path.exists():
            found = read_result(path, kind)
            if (found["settings"], found["seed"]) != (settings, seed):
                raise OutputError(f"{path} has results of other settings; name another file, or remove this one.")
            self.rows = found["rows"]

    def find(self, **keys: Any) -> dict[str, Any] | None:
        """The row that has these entries, if it was measured already."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in keys.items())), None)

    def find_recipe(self, name: str, recipe: Recipe | None, tables: str | None = None, **keys: Any) -> dict[str, Any] | None:
        """The row of a recipe that has these entries; raises OutputError where it is another recipe's of the same name.

        Rows have `recipe`, the name, its `definition`, and the checksum of `tables` that were given. recipe: None for the
        model's own cache. tables: those that are given now, if any, of which the row must be.
        """
        row = self.find(**keys, recipe=name)
        if row is not None and row["definition"] != definition(recipe):
            raise OutputError(f"{self.path} has results of another recipe called {name}; rename one of the two.")
        if row is not None and tables not in (None, row.get("tables")):
            raise OutputError(f"{self.path} has results of other tables of recipe {name}; name another folder.")
        return row

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.rows.append(row)
        write_json(self.path, self._head | {"rows": self.rows})


def write_result(path: Path, kind: str, command: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a file of results at once, in place of any that is there: for metrics of one run only, like times."""
    write_json(path, _head(kind, command, settings, seed=0) | {"rows": rows})


def _head(kind: str, command: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "command": command,
        "seed": seed,
        "date": date.today().isoformat(),
        "settings": settings,
        "environment": environment(),
    }


def read_result(path: Path, kind: str | None = None) -> dict[str, Any]:
    """What a ResultFile has written; raises FileFormatError for anything else, or another kind than requested."""
    found = read_json(path)
    fields = {"kind": str, "command": str, "seed": int, "date": str, "settings": dict, "environment": dict, "rows": list}
    fits = found.get("format") == FORMAT and found.get("format_version") == FORMAT_VERSION
    if not fits or any(not isinstance(found.get(name), what) for name, what in fields.items()):
        raise FileFormatError(f"{path} is not a file of results of this version; measure again.")
    if kind not in (None, found["kind"]):
        raise FileFormatError(f"{path} has results of {found['kind']}, not of {kind}; name another file.")
    return found


def definition(recipe: Recipe | None) -> str | None:
    """A checksum of a recipe's settings, by which rows of another recipe of the same name are distinguished; or None."""
    return None if recipe is None else checksum(json.dumps(recipe.settings(), sort_keys=True).encode())
