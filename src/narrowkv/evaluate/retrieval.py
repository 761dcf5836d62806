"""Recall tests: does a model still find, far back in its context, what it was given?

Two kinds of rows are generated for any Hugging Face tokenizer: ``facts`` states a few facts within
running text and queries one of them at the end; ``passages`` shows the beginning of an earlier
passage again, to be continued.  ``accuracy`` scores a model's logits on either.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from narrowkv.errors import TextError
from narrowkv.evaluate.windows import Text, encode, joined, start_tokens

NAMES = [
    "Abigail",
    "Bernard",
    "Beatrice",
    "Clement",
    "Cordelia",
    "Desmond",
    "Felicity",
    "Gilbert",
    "Harriet",
    "Imogen",
    "Jasper",
    "Leonard",
    "Lucinda",
    "Magnus",
    "Matilda",
    "Nigel",
    "Octavia",
    "Phoebe",
    "Rosalind",
    "Rupert",
    "Sylvia",
    "Tobias",
    "Ursula",
    "Vincent",
    "Winifred",
    "Wilfred",
]
ADJECTIVES = [
    "amber",
    "ancient",
    "bitter",
    "brave",
    "bronze",
    "clever",
    "crimson",
    "crystal",
    "distant",
    "dusty",
    "faithful",
    "frozen",
    "gentle",
    "golden",
    "hidden",
    "hollow",
    "humble",
    "marble",
    "narrow",
    "purple",
    "quiet",
    "rapid",
    "scarlet",
    "silent",
    "silver",
    "velvet",
]
NOUNS = [
    "anchor",
    "arrow",
    "blanket",
    "bottle",
    "bridge",
    "candle",
    "castle",
    "compass",
    "copper",
    "falcon",
    "feather",
    "forest",
    "garden",
    "hammer",
    "harbour",
    "island",
    "kettle",
    "lantern",
    "meadow",
    "mirror",
    "pepper",
    "ribbon",
    "river",
    "saddle",
    "shadow",
    "thunder",
]

FACTS_PER_ROW = 4
PASSAGE_CUE = 16
PASSAGE_ANSWER = 8


@dataclass(frozen=True)
class RecallBatch:
    """Rows of token ids, and which of the tokens a model must predict.

    input_ids: [count, length] int64, every row equally long; answer_mask: [count, length] bool.
    """

    input_ids: torch.Tensor
    answer_mask: torch.Tensor


def fact_parts(name: str, answer: str) -> tuple[str, str, str]:
    """Return a fact's question prefix, its answer and its end, which joined make a sentence."""
    return f"The password of {name} is", f" {answer}", "."


def facts(tokenizer: Any, filler: Sequence[int], distance: int, count: int, seed: int, bos: bool | None = None) -> RecallBatch:
    """Build rows that state facts within running text and end in the answer about one of them.

    ``distance`` is the number of tokens from the first token of the answer where it is stated to
    its first token at the end.  Every fact is a paragraph of its own; the queried one and its
    distractors differ in names and answers.  ``bos`` is like that of ``start_tokens``.  Returns ids
    [count, length] int64 and mask [count, length] bool.  Raises ValueError if ``filler`` is empty,
    ``count`` is below 1 or ``distance`` leaves no space for the distractors.
    """
    _check(filler, count)
    rng = random.Random(f"facts-{seed}")
    start = start_tokens(tokenizer, bos)
    gap = encode(tokenizer, "\n\n")
    drawn = [draw_facts(tokenizer, rng) for _ in range(count)]
    lead = max(len(gap + row[0][0] + row[0][1]) for row in drawn) + len(start) + 4
    length = lead + distance
    rows = []
    for row in drawn:
        queried, *distractors = ((gap + prefix, answer, end + gap) for prefix, answer, end in row)
        before = length - distance - len(queried[0]) - len(queried[1])
        free = distance - len(queried[1]) - len(queried[2]) - len(queried[0])
        free -= sum(len(part) for fact in distractors for part in fact)
        if free < 0:
            raise ValueError(f"distance {distance} is too small: this tokenizer's facts need {distance - free}")
        text = cycle(filler, rng.randrange(len(filler)), before - len(start) + free)
        cuts = sorted(rng.randint(0, free) for _ in distractors)
        ids = start + text[: before - len(start)] + queried[0] + queried[1] + queried[2]
        text = text[before - len(start) :]
        for fact, begin, stop in zip(distractors, [0, *cuts], cuts, strict=False):
            ids += text[begin:stop] + fact[0] + fact[1] + fact[2]
        ids += text[cuts[-1] :] + queried[0] + queried[1]
        rows.append((ids, len(queried[1])))
    return _batch(rows)


def passages(
    tokenizer: Any, filler: Sequence[int], distance: int, count: int, seed: int, bos: bool | None = None
) -> RecallBatch:
    """Build rows of running text whose end repeats a passage from ``distance`` tokens before.

    The first ``PASSAGE_CUE`` repeated tokens are shown, the next ``PASSAGE_ANSWER`` must be
    predicted.  ``bos`` is like that of ``start_tokens``.  Returns ids [count, length] int64 and mask
    [count, length] bool.  Raises ValueError if ``filler`` is empty,
    ``count`` is below 1 or ``distance`` is shorter than the passage.
    """
    _check(filler, count)
    passage = PASSAGE_CUE + PASSAGE_ANSWER
    if distance < passage:
        raise ValueError(f"distance {distance} is too small: a passage has {passage} tokens")
    rng = random.Random(f"passages-{seed}")
    start = start_tokens(tokenizer, bos)
    rows = []
    for _ in range(count):
        lead = 8
        text = cycle(filler, rng.randrange(len(filler)), lead + distance)
        rows.append((start + text + text[lead : lead + passage], PASSAGE_ANSWER))
    return _batch(rows)


def recall_batches(
    tokenizer: Any, text: Text, distance: int, rows: int, seed: int = 0, bos: bool | None = None
) -> list[RecallBatch]:
    """``rows`` rows of each kind over ``distance`` tokens within a text, or none where that is 0.

    Raises TextError where such rows cannot be built.
    """
    if distance == 0:
        return []
    filler = encode(tokenizer, joined(text))
    try:
        return [make(tokenizer, filler, distance, rows, seed, bos) for make in (facts, passages)]
    except ValueError as error:
        raise TextError(f"Recall over {distance} tokens cannot be tested: {error}.") from error


def accuracy(logits: torch.Tensor, batch: RecallBatch) -> float:
    """Return the share of rows in which every answer token is the arg max of its prediction.

    ``logits`` is [count, length, vocab], or [count, n, vocab] for the last ``n`` positions
    alone, as models give it for ``logits_to_keep``.  Raises ValueError if the shapes do not fit or
    these positions do not cover the answers.
    """
    count, length = batch.input_ids.shape
    if logits.ndim != 3 or logits.shape[0] != count or logits.shape[1] > length:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit {count} rows of {length} tokens")
    first = length - logits.shape[1]
    if batch.answer_mask[:, : first + 1].any():
        raise ValueError(f"logits of the last {logits.shape[1]} positions miss answer tokens")
    predicted = logits[:, :-1].argmax(-1)
    expected = batch.input_ids[:, first + 1 :].to(predicted.device)
    mask = batch.answer_mask[:, first + 1 :].to(predicted.device)
    right = (predicted == expected) | ~mask
    return right.all(dim=1).double().mean().item()


def draw_facts(tokenizer: Any, rng: random.Random, count: int = FACTS_PER_ROW) -> list[tuple[list[int], ...]]:
    """Draw one row's facts, at most 26, each as token ids of prefix, answer and end; no two share a name or a noun."""
    names = rng.sample(NAMES, count)
    nouns = rng.sample(NOUNS, count)
    drawn = []
    for name, noun in zip(names, nouns, strict=True):
        words = [*rng.sample(ADJECTIVES, rng.choice((1, 2))), noun]
        parts = fact_parts(name, " ".join(words))
        drawn.append(tuple(encode(tokenizer, part) for part in parts))
    return drawn


def cycle(filler: Sequence[int], begin: int, length: int) -> list[int]:
    """Return ``length`` tokens of the filler from ``begin`` on, starting over at its end."""
    return [filler[(begin + offset) % len(filler)] for offset in range(length)]


def _check(filler: Sequence[int], count: int) -> None:
    """Raise ValueError if there is no filler or no row to build."""
    if len(filler) == 0:
        raise ValueError("filler is empty: recall rows need some ordinary text around the answer")
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")


def _batch(rows: list[tuple[list[int], int]]) -> RecallBatch:
    """Stack equally long rows whose last tokens, as many as given with each, are the answers."""
    ids = torch.tensor([row for row, _ in rows], dtype=torch.int64, device="cpu")
    positions = torch.arange(ids.shape[1], dtype=torch.int64, device="cpu")
    answers = torch.tensor([answer for _, answer in rows], dtype=torch.int64, device="cpu")
    return RecallBatch(ids, positions[None, :] >= ids.shape[1] - answers[:, None])
