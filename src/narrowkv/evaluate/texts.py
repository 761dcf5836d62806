"""The built-in texts: the language reference behind ``help()``, which every CPython carries, and a mix of our own.

The topics of :mod:`pydoc_data.topics` are split into a held-out part, for evaluation, and a
training part.  Topics quote one another, so a paragraph of the held-out part is removed wherever
else it occurs.  The mix was written for this package: articles, stories, news, source code, conversations,
languages, mathematics, records, and lists whose entries are looked up later.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_TOPICS = (
    "calls",
    "comparisons",
    "debugger",
    "execmodel",
    "import",
    "strings",
    "try",
)
"""Topics stored out of training: long, mostly prose, on unrelated subjects."""

_SHORTEST_DISTINCTIVE_PARAGRAPH = 40
_MIX = Path(__file__).with_name("mix")
_BETWEEN_DOCUMENTS = "\n%%%%\n"
_BLANK_LINES = re.compile(r"\n\s*\n")


@cache
def held_out_text() -> str:
    """Return the held-out topics of the running Python, joined in a stable order."""
    present = [topics[name].strip() for name in HELD_OUT_TOPICS if name in topics]
    return "\n\n".join(present)


@cache
def training_text() -> str:
    """Return the other topics, each paragraph once, without any paragraph of the held-out ones."""
    seen = {key for key in map(_key, _paragraphs(held_out_text())) if _distinctive(key)}
    paragraphs: list[str] = []
    for name in sorted(topics):
        if name in HELD_OUT_TOPICS:
            continue
        for paragraph in _paragraphs(topics[name]):
            key = _key(paragraph)
            if key in seen:
                continue
            if _distinctive(key):
                seen.add(key)
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


@cache
def mixed_text() -> str:
    """Return the documents of all kinds in turns, those of each kind spread evenly over the text."""
    ordered: list[tuple[float, str, str]] = []
    for path in _MIX.glob("*.txt"):
        documents = path.read_text(encoding="utf-8").strip("\n").split(_BETWEEN_DOCUMENTS)
        ordered += [((i + 0.5) / len(documents), path.name, document) for i, document in enumerate(documents)]
    return "\n\n".join(document for _, _, document in sorted(ordered))


def _paragraphs(text: str) -> list[str]:
    """Split text on blank lines, dropping empty paragraphs."""
    return [paragraph for paragraph in _BLANK_LINES.split(text.strip()) if paragraph.strip()]


def _key(paragraph: str) -> str:
    """Return the paragraph with every run of white space made one space."""
    return " ".join(paragraph.split())


def _distinctive(key: str) -> bool:
    """Whether a paragraph is long enough to be recognized as the same one elsewhere."""
    return len(key) > _SHORTEST_DISTINCTIVE_PARAGRAPH
