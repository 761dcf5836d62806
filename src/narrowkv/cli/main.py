"""The command `narrowkv`."""

import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from rich.markup import escape

from narrowkv._version import __version__
from narrowkv.cli import (
    ablate,
    calibrate,
    chat,
    compare,
    demo,
    env,
    eval,
    export,
    generate,
    inspect,
    plan,
    recipes,
    replay,
    report,
    serve,
    tasks,
)
from narrowkv.cli.common import GIVEN, err, out
from narrowkv.errors import NarrowKVError, NarrowKVWarning, TextError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(demo.demo)
app.command()(calibrate.calibrate)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command("eval")(eval.evaluate)
app.command()(compare.compare)
app.command()(ablate.ablate)
app.command()(inspect.inspect)
app.command()(tasks.tasks)
app.command()(plan.plan)
app.command()(report.report)
app.command()(replay.replay)
app.command()(export.export)
app.add_typer(recipes.app, name="recipes")
app.command()(env.env)
_SHOW = warnings.showwarning


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def main(version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True)) -> None:
    """Quantize a language model's key/value cache to 2, 3 or 4 bits instead of 16."""


def _show_warning(message: Warning | str, category: type[Warning], *location: Any, **shown: Any) -> None:
    """Print warnings of ours as one sentence without the source line, and others as usual."""
    if issubclass(category, NarrowKVWarning):
        err.print(f"[bold yellow]Warning:[/bold yellow] {escape(str(message))}", highlight=False, soft_wrap=True)
    else:
        _SHOW(message, category, *location, **shown)


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors of ours become one sentence on standard error and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal lacks ends no command
    given = sys.argv[1:] if arguments is None else arguments
    GIVEN.set(given)
    try:
        _require_text(given)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(given)
    except NarrowKVError as error:
        _fail(str(error))
    except OSError as error:  # standard output is full or was closed
        _fail(f"Cannot write what was found: {error.strerror or error}; choose a disk with free space.")


def _require_text(arguments: Sequence[str]) -> None:
    """Raise TextError for what a shell hands over where it was given bytes that are no text."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"The argument {argument!r} has bytes that are not UTF-8 text; write it in UTF-8.") from error


def _fail(sentence: str) -> None:
    err.print(f"[bold red]Error:[/bold red] {escape(sentence)}", highlight=False, soft_wrap=True)
    sys.exit(1)
