"""`narrowkv replay`: the commands behind the figures of the pages run again, and the figures compared."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrowkv.cli.common import err, note, out
from narrowkv.cli.options import folder_to_write

if TYPE_CHECKING:
    from narrowkv.evaluate.claims import Claim, Claims
    from narrowkv.evaluate.replay import Outcome

FOLDER = Path("build") / "replays"


def replay(
    claims: Annotated[list[str] | None, typer.Argument(help="Names of claims, see --list.", metavar="CLAIM...")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Replay every claim.")] = False,
    here: Annotated[
        bool, typer.Option("--here", help="Run the short forms of the commands, within wider tolerances.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the claims and run nothing.")] = False,
    models: Annotated[
        Path | None, typer.Option(envvar="NARROWKV_MODELS", help="Folder of the folders of real models.", metavar="FOLDER")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=folder_to_write,
            metavar="FOLDER",
            help="Folder for what is found; what is complete there is not run again.",
            show_default=f"{FOLDER} of the clone",
        ),
    ] = None,
) -> None:
    """Run the commands behind figures of the README and the docs again, in a clone, and compare the figures."""
    from narrowkv.evaluate.claims import find_root, read_claims
    from narrowkv.evaluate.replay import DIFFERS, OK, SKIPPED, Replay

    found = read_claims(find_root(Path.cwd()))
    if listing:
        for claim in found.claims.values():
            show(found, claim)
        return
    wanted = choose(found, claims, everything)
    runs = Replay(found, folder or found.root / FOLDER, here, models, lambda command: note(f"Running {command}"))
    verdicts = []
    with ended_with_us():
        for claim in wanted:
            for outcome in runs.outcomes(claim):
                out.print(line(outcome), highlight=False, markup=False, soft_wrap=True)
                verdicts.append(outcome.verdict)
    counted = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (OK, DIFFERS, SKIPPED))
    err.print(f"Figures: {counted}.", highlight=False)
    if DIFFERS in verdicts:
        raise typer.Exit(1)


@contextlib.contextmanager
def ended_with_us() -> Iterator[None]:
    """Within, SIGTERM ends the command that runs too."""

    def stop(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def choose(found: "Claims", names: list[str] | None, everything: bool) -> "list[Claim]":
    """The claims that were named, or all; raises ReportError for others, and where nothing is named."""
    from narrowkv.errors import ReportError

    if everything:
        return list(found.claims.values())
    unknown = [name for name in names or [] if name not in found.claims]
    if unknown or not names:
        what = f"There is no claim called {unknown[0]}" if unknown else "No claim is named"
        raise ReportError(f"{what}; give names that `narrowkv replay --list` prints, or --all.")
    return [found.claims[name] for name in names]


def show(found: "Claims", claim: "Claim") -> None:
    """Print a claim's name, where it stands, its status, and its sentence."""
    where = claim.plot or claim.page
    out.print(f"{claim.name} ({where}, {found.status(claim)})", highlight=False, markup=False, soft_wrap=True)
    sentence = " ".join(claim.written(found.rows(claim)).split())
    out.print(f"    {sentence}", highlight=False, markup=False, soft_wrap=True)


def line(outcome: "Outcome") -> str:
    """What became of a figure, in one line."""
    what = f"{outcome.verdict:8} {outcome.claim} {outcome.figure}: "
    if outcome.why:
        return f"{what}{outcome.why}"
    return f"{what}claimed {outcome.claimed}, found {outcome.found}, tolerance {outcome.tolerance}"
