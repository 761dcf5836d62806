"""`narrowkv env`: versions and hardware, for reports."""

from rich.table import Table

from narrowkv.cli.common import out
from narrowkv.cli.options import JsonOption
from narrowkv.files import write_json


def env(json_file: JsonOption = None) -> None:
    """Print versions and hardware, for bug reports."""
    from narrowkv.evaluate.results import environment

    found = environment()
    table = Table(show_header=False)
    for name, what in found.items():
        table.add_row(name, ", ".join(what) if isinstance(what, list) else str(what))
    out.print(table)
    if json_file is not None:
        write_json(json_file, found)
