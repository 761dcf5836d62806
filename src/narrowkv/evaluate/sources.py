"""Where texts come from: a file, a pipe, a data set of the Hugging Face hub, or the built-in text."""

import os
from collections.abc import Iterable
from pathlib import Path

from narrowkv.defaults import MIX
from narrowkv.errors import TextError
from narrowkv.evaluate import texts

BUILT_IN_TEXTS = {
    MIX: texts.mixed_text,
    "narrowkv://train": texts.training_text,
    "narrowkv://held-out": texts.held_out_text,
}
STANDARD_INPUT = "-"


def read_text(name: str) -> str:
    """The text called `name`: `narrowkv://mix` (of many kinds, to learn tables from), `narrowkv://train` or
    `narrowkv://held-out` (parts of Python's own language reference), a UTF-8 file or pipe, standard input as `-`, or a
    data set as NAME or NAME:CONFIGURATION:SPLIT, read with the package `datasets` if it is installed.

    Raises TextError where there is none, or where it is empty or not text.
    """
    if name in BUILT_IN_TEXTS:
        return BUILT_IN_TEXTS[name]()
    if name != STANDARD_INPUT and (os.path.isdir(name) or not os.path.exists(name)):
        return _from_datasets(name)
    text = _read(name)
    if not text.strip():
        raise TextError(f"{_shown(name)} is empty; give a text with at least one window of tokens.")
    return text


def read_texts(names: Iterable[str]) -> list[str]:
    """Several texts, like those of `read_text`."""
    return [read_text(name) for name in names]


def read_prompt(name: str) -> str:
    """The prompt in a UTF-8 file or pipe, or on standard input as `-`. Raises TextError where there is none."""
    if name.startswith("narrowkv:"):
        raise TextError(f"{name} is no file, and texts of that kind are no prompts; name a file, or give --prompt TEXT.")
    if os.path.isdir(name):
        raise TextError(f"{name} is a folder; name a file with the prompt.")
    if name != STANDARD_INPUT and not os.path.exists(name):
        raise TextError(f"There is no file {name!r}; check the path, or give the prompt itself with --prompt.")
    prompt = _read(name)
    if not prompt:
        raise TextError(f"{_shown(name)} is empty, and a prompt is not; write at least one word into it.")
    return prompt


def _read(name: str) -> str:
    """The text of a file, a pipe or standard input, without the byte order mark with which some editors begin a file."""
    try:
        source: int | str = 0 if name == STANDARD_INPUT else name
        with open(source, encoding="utf-8-sig", closefd=name != STANDARD_INPUT) as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise TextError(f"Cannot read {_shown(name)} as UTF-8 text ({error}); give a plain text file.") from error


def _shown(name: str) -> str:
    return "Standard input" if name == STANDARD_INPUT else name


def _from_datasets(name: str) -> str:
    missing = f"There is no text file {name}, and no built-in text of that name ({', '.join(BUILT_IN_TEXTS)})"
    if Path(name).suffix or name.startswith(("narrowkv:", "/", ".")):
        raise TextError(f"{missing}; check the path.")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError(f"{missing}; to read data sets by name, `pip install datasets`.") from error
    dataset, configuration, split = [*name.split(":"), "", ""][:3]
    try:
        rows = load_dataset(dataset, configuration or None, split=split or "test")
    except Exception as error:  # the package raises many kinds, all of which mean that there is no such data
        raise TextError(f"{missing}, and the data set cannot be loaded: {str(error).splitlines()[0]}") from error
    column = "text" if "text" in rows.column_names else rows.column_names[0]
    text = "\n".join(str(row) for row in rows[column])
    if not text.strip():
        raise TextError(f"Data set {name} has no text in its column {column!r}; choose another.")
    return text
