"""`narrowkv chat`: a conversation with a model on one packed cache."""

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

HELP = "/reset clears the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
    calibration_text: CalibrationTextOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer at most.")] = 512,
    temperature: TemperatureOption = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Sample from the most likely tokens with this total probability.")
    ] = 1.0,
    seed: SeedOption = 0,
    window: LearnedWindowOption = None,
    samples: LearnedSamplesOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
) -> None:
    """Chat with a model on one packed cache; turns can also come from standard input, one per line."""
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
        note("The model has no chat template: turns are joined as plain text, which suits base models.")
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
    """Whether the turns are typed at a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def turns() -> Iterator[str]:
    """Turns of the user, until the end of standard input or /exit; at a terminal with a prompt and line editing."""
    interactive = at_terminal()
    if sys.stdin is None:  # it was closed
        return
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() uses it)
    while True:
        try:
            turn = input("> " if interactive else "").strip()
            turn.encode()
        except UnicodeError as error:
            raise TextError("Standard input has bytes that are not UTF-8 text; write it in UTF-8.") from error
        except (EOFError, KeyboardInterrupt):
            if interactive:
                out.print()
            return
        if turn == "/exit":
            return
        if turn:
            yield turn


def answer(talk: "Conversation", turn: str, tokens: int, sampling: dict[str, Any]) -> None:
    """Print an answer as it is generated, then the size of the cache; Ctrl-C ends the answer, not the conversation."""
    interrupted = False

    def interrupt(*signal_and_frame: object) -> None:
        nonlocal interrupted
        if interrupted:  # a second time: stop immediately
            raise KeyboardInterrupt
        interrupted = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        talk.ask(turn, tokens, _show, lambda: interrupted, **sampling)
    except TextError as error:
        if not at_terminal():
            raise
        note(str(error))
    except KeyboardInterrupt:
        note("Stopped; this turn was removed.")
    finally:
        signal.signal(signal.SIGINT, before)
    out.print()
    if talk.read_anew:
        note("The chat template changed earlier turns and this cache cannot be cropped, so the conversation was read again.")
    note(summary(talk.cache))


def _show(words: str) -> None:
    out.print(words, end="", markup=False, highlight=False, soft_wrap=True)
