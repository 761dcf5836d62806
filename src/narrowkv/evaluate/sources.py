"""Where texts come from: a file, a data set of the Hugging Face hub, or the built-in text."""

from pathlib import Path

from narrowkv.errors import TextError
from narrowkv.evaluate import texts

BUILT_IN_TEXTS = {"narrowkv://train": texts.training_text, "narrowkv://held-out": texts.held_out_text}


def read_text(name: str) -> str:
    """The text called `name`: `narrowkv://train` or `narrowkv://held-out` (parts of Python's own language reference), a
    UTF-8 file, or a data set as NAME or NAME:CONFIGURATION:SPLIT, read with the package `datasets` if it is installed.

    Raises TextError where there is none, or where it is empty or not text.
    """
    if name in BUILT_IN_TEXTS:
        return BUILT_IN_TEXTS[name]()
    path = Path(name)
    if not path.is_file():
        return _from_datasets(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"Cannot read {name} as UTF-8 text ({error}); give a plain text file.") from error
    if not text.strip():
        raise TextError(f"{name} is empty; give a text with at least one window of tokens.")
    return text


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
