"""Windows: sequences of token ids of one length, spread evenly over a text or over several."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narrowkv.errors import TextError

Text = str | Sequence[str]  # one text, or several that share the windows
CHARACTERS = 12  # of text for each token that is wanted, at first
PROBE = "The quick brown fox, 1."


def start_tokens(tokenizer: Any, bos: bool | None = None) -> list[int]:
    """The token ids that a text begins with: by default those that `tokenizer(text)` puts in front of it.

    bos: True puts the tokenizer's beginning-of-text token there, False nothing. Raises TextError where there is no such token.
    """
    if bos is None:
        plain, whole = encode(tokenizer, PROBE), list(tokenizer(PROBE)["input_ids"])
        found = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
        return whole[: next(found, 0)]
    if bos and tokenizer.bos_token_id is None:
        raise TextError("This tokenizer has no beginning-of-text token; leave --bos out, which does what the tokenizer does.")
    return [tokenizer.bos_token_id] if bos else []


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, without special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def prompt_tokens(tokenizer: Any, prompt: str, bos: bool | None = None) -> Tensor:
    """Token ids [1, tokens] int64 of a text to be continued: `start_tokens` and the text, with nothing at its end."""
    return torch.tensor([start_tokens(tokenizer, bos) + encode(tokenizer, prompt)], dtype=torch.int64, device="cpu")


def joined(text: Text) -> str:
    """Several texts as one."""
    return text if isinstance(text, str) else "\n\n".join(text)


def cut_windows(
    tokenizer: Any, text: Text, window: int, limit: int | None = None, *, spread: int | None = None, bos: bool | None = None
) -> Tensor:
    """Cut non-overlapping windows of text: token ids [n, window] int64, each after the `start_tokens` of the tokenizer.

    text: one, or several, which share the windows equally. limit: the most windows, spread evenly over the text; by default
    all that it has. spread: number of positions over which windows are spread, of which the first `limit` are used; by default
    `limit`. Position i of n is the first line that begins after (i + 1/2) / n of the text; if lines are too long or the text
    is too short, the window is centered there. bos: like those of `start_tokens`.

    Raises TextError if a text is shorter than one window, or if there are more texts than windows.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if limit is not None and (spread or limit) < limit:
        raise TextError(f"{limit} windows cannot be taken from {spread} positions; give --spread {limit} or more.")
    if not texts:
        raise TextError("There is no text to cut windows from; give one or more.")
    if limit is not None and limit < len(texts):
        raise TextError(f"{len(texts)} texts share the windows, so {limit} are too few; set at least {len(texts)}.")
    start = start_tokens(tokenizer, bos)
    counts, positions = _shares(limit, len(texts)), _shares(spread or limit, len(texts))
    rows: list[list[int]] = []
    for i, (part, *share) in enumerate(zip(texts, counts, positions, strict=True), 1):
        chunks = _chunks(tokenizer, part, window - len(start), *share)
        if not chunks:
            name = "The text" if len(texts) == 1 else f"Text {i} of {len(texts)}"
            raise TextError(
                f"{name} has {len(encode(tokenizer, part))} tokens, one window needs {max(window - len(start), 1)}; give a "
                "longer text or a smaller --window."
            )
        rows += [start + chunk for chunk in chunks]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def cut_apart(
    tokenizer: Any, text: Text, window: int, first: int, second: int, *, bos: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Two sets of windows of the same text that have no token in common, each spread over all of it, like those of
    `cut_windows`.

    first, second: windows of each at most; where the text is too short for both, the second has fewer, or none.
    """
    every = cut_windows(tokenizer, text, window, first + second, bos=bos)
    chosen = torch.zeros(len(every), dtype=torch.bool, device="cpu")
    count = min(first, len(every))
    chosen[(2 * torch.arange(count, dtype=torch.int64, device="cpu") + 1) * len(every) // (2 * count)] = True
    return every[chosen], every[~chosen]


def _shares(total: int | None, parts: int) -> list[int | None]:
    """A number divided as equally as may be; nothing where there is none."""
    return [None if total is None else total // parts + (i < total % parts) for i in range(parts)]


def _chunks(tokenizer: Any, text: str, size: int, count: int | None, positions: int | None) -> list[list[int]]:
    """The first `count` chunks of `size` tokens at evenly spread positions of a text; fewer if it is too short."""
    if size < 1:
        return []
    found = _at_lines(tokenizer, text, size, count or positions, positions) if positions else None
    if found is not None:
        return found
    ids = encode(tokenizer, text)
    positions = min(positions or len(ids) // size, len(ids) // size)
    starts = [(len(ids) * (2 * i + 1) // positions - size) // 2 for i in range(min(count or positions, positions))]
    return [ids[start : start + size] for start in starts]


def _at_lines(tokenizer: Any, text: str, size: int, count: int | None, positions: int) -> list[list[int]] | None:
    """Chunks that begin with a line and do not overlap; None if the text has none."""
    starts = [text.find("\n", len(text) * (2 * i + 1) // (2 * positions)) + 1 for i in range(positions)]
    chunks = []
    for start, end in zip(starts[:count], [*starts[1:], len(text)], strict=False):
        ids = _first_tokens(tokenizer, text[start:end], size) if start else []
        if len(ids) < size:
            return None
        chunks.append(ids)
    return chunks


def _first_tokens(tokenizer: Any, text: str, size: int) -> list[int]:
    """The first `size` token ids of a text, of which no more is read than is needed."""
    length = CHARACTERS * size
    while True:
        ids = encode(tokenizer, text[:length])
        if len(ids) > size or length >= len(text):
            return ids[:size]
        length *= 4
