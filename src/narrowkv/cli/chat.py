"""`narrowkv chat`: talk with a model whose memory of the conversation is packed."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrowkv.cli.common import find_sources, learns, load_model, note, note_mix, out, texts_to_learn, windows_to_learn
from narrowkv.cli.generate import summary
from narrowkv.cli.options import (
    BackendOption,
    CalibrationOption,
    CalibrationTextOption,
    DeviceOption,
    DtypeOption,
    LearnedSamplesOption,
    LearnedWindowOption,
    ModelArgument,
    RecipeOption,
    SeedOption,
    TemperatureOption,
)
from narrowkv.defaults import AUTO
from narrowkv.errors import TextError

if TYPE_CHECKING:
    from narrowkv.integrations.conversation import Conversation

HELP = "/reset forgets what was said, /exit leaves (as Ctrl-D does), Ctrl-C stops an answer."


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="An instruction that comes before all turns.")] = None,
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
    calibration_text: CalibrationTextOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 512,
    temperature: TemperatureOption = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of sampling: the most likely tokens of this weight.")] = 1.0,
    seed: SeedOption = 0,
    window: LearnedWindowOption = None,
    samples: LearnedSamplesOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
) -> None:
    """Talk with a model in several turns on one packed cache; reads turns from standard input too, one a line."""
    import torch

    from narrowkv.evaluate.sources import read_texts
    from narrowkv.integrations import PackedCache
    from narrowkv.integrations.conversation import Conversation

    tables = [] if calibration is None else [calibration]
    sources = texts_to_learn(model, calibration_text)
    window, samples = windows_to_learn(sources, window, samples)
    learn_from = read_texts(sources)
    loaded, tokenizer = load_model(model, dtype, device)
    note_mix(model, calibration_text, learns(recipe, tables))
    (source,) = find_sources(loaded, tokenizer, recipe, tables, learn_from, window, samples, backend)
    torch.manual_seed(seed)
    talk = Conversation(loaded, tokenizer, PackedCache(loaded, source, backend=backend), system)
    if not talk.templated:
        note("The model has no chat template: turns are joined as plain text, which suits models that only continue texts.")
    if at_terminal():
        note(HELP)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    for turn in turns():
        if turn == "/reset":
            talk.reset()
        elif turn.startswith("/"):
            note(HELP)
        else:
            answer(talk, turn, max_new_tokens, sampling)


def at_terminal() -> bool:
    """Whether somebody types the turns."""
    return sys.stdin is not None and sys.stdin.isatty()


def turns() -> Iterator[str]:
    """What the user says, until the end of standard input or /exit; on a terminal after a prompt, and lines can be edited."""
    asks = at_terminal()
    if sys.stdin is None:  # it was closed
        return
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() uses it)
    while True:
        try:
            turn = input("> " if asks else "").strip()
            turn.encode()
        except UnicodeError as error:
            raise TextError("Standard input holds bytes that are not UTF-8 text; write it in UTF-8.") from error
        except (EOFError, KeyboardInterrupt):
            if asks:
                out.print()
            return
        if turn == "/exit":
            return
        if turn:
            yield turn


def answer(talk: "Conversation", turn: str, tokens: int, sampling: dict[str, Any]) -> None:
    """Print an answer as it comes, and what the cache takes after it; Ctrl-C ends the answer, not the conversation."""
    asked = False

    def ask(*signal_and_frame: object) -> None:
        nonlocal asked
        if asked:  # once more: at once
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        talk.ask(turn, tokens, _show, lambda: asked, **sampling)
    except TextError as error:
        if not at_terminal():
            raise
        note(str(error))
    except KeyboardInterrupt:
        note("Stopped; this turn is forgotten.")
    finally:
        signal.signal(signal.SIGINT, before)
    out.print()
    if talk.read_anew:
        note("The chat template spelled earlier turns anew and this cache cannot go back: all was read again.")
    note(summary(talk.cache))


def _show(words: str) -> None:
    out.print(words, end="", markup=False, highlight=False, soft_wrap=True)
