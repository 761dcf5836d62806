"""The command `narrowkv`."""

import sys
from collections.abc import Sequence

import typer
from rich.markup import escape

from narrowkv import __version__
from narrowkv.cli import ablate, calibrate, compare, demo, env, eval, generate, inspect, plan, recipes, report, tasks
from narrowkv.cli.common import GIVEN, err, out
from narrowkv.errors import NarrowKVError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(demo.demo)
app.command()(calibrate.calibrate)
app.command()(generate.generate)
app.command("eval")(eval.evaluate)
app.command()(compare.compare)
app.command()(ablate.ablate)
app.command()(inspect.inspect)
app.command()(tasks.tasks)
app.command()(plan.plan)
app.command()(report.report)
app.add_typer(recipes.app, name="recipes")
app.command()(env.env)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def main(version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True)) -> None:
    """Keep a language model's key/value cache in 2, 3 or 4 bits instead of 16."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors of ours become one sentence on standard error and exit status 1."""
    given = sys.argv[1:] if arguments is None else arguments
    GIVEN.set(given)
    try:
        app(given)
    except NarrowKVError as error:
        err.print(f"[bold red]Error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
