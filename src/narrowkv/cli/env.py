"""`narrowkv env`: versions and hardware, for reports."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from narrowkv import __version__, _kernels
from narrowkv.attention import BACKENDS
from narrowkv.cli.common import JsonOption, out
from narrowkv.files import write_json


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
        "instruction_sets": _kernels.instruction_sets(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": sorted(BACKENDS),
    }


def env(json_file: JsonOption = None) -> None:
    """Print versions and hardware, for reports."""
    found = environment()
    table = Table(show_header=False)
    for name, what in found.items():
        table.add_row(name, ", ".join(what) if isinstance(what, list) else str(what))
    out.print(table)
    if json_file is not None:
        write_json(json_file, found)
