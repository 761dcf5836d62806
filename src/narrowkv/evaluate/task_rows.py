"""Rows of long-context tasks, made for any tokenizer: something is stated within running text, and queried at the end.

The facts are those of `recall`. Variable tracking and counting are those of RULER (Hsieh et al., arXiv 2404.06654, section
3), in words of their own.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from narrowkv.errors import TextError
from narrowkv.evaluate.retrieval import ADJECTIVES, NAMES, NOUNS, RecallBatch, cycle, draw_facts
from narrowkv.evaluate.windows import encode, start_tokens

NEEDLES = 4  # queried in a row
PAIRS_SHARE = 0.5  # of a row's tokens that pairs of names and passwords take, where all of them are filler to one another
CHAIN = 4  # variables of one value
MOST_COUNTED = 9

Part = tuple[list[int], bool]  # token ids, and whether they are an answer
Statements = list[tuple[float, list[int]]]  # at which depth of the text, from 0 to 1, which paragraphs stand
Maker = Callable[[Any, random.Random, float | None, int], tuple[Statements, list[Part]]]


def passkey(tokenizer: Any, rng: random.Random, depth: float | None, length: int) -> tuple[Statements, list[Part]]:
    """One fact at a depth among distractors anywhere, and its query."""
    (prefix, answer, end), *others = draw_facts(tokenizer, rng)
    where = rng.random() if depth is None else depth
    statements = [(where, prefix + answer + end), *((rng.random(), _sentence(fact)) for fact in others)]
    return statements, [(prefix, False), (answer, True)]


def key_value(tokenizer: Any, rng: random.Random, depth: float | None, length: int) -> tuple[Statements, list[Part]]:
    """As many facts as take half of the row, at most 26, and one of them queried."""
    facts = draw_facts(tokenizer, rng, len(NAMES))
    free = PAIRS_SHARE * length
    chosen: list[tuple[list[int], ...]] = []
    for fact in facts:
        free -= sum(map(len, fact)) + len(encode(tokenizer, "\n\n"))
        if free < 0 and chosen:
            break
        chosen.append(fact)
    prefix, answer, _ = rng.choice(chosen)
    return [(rng.random(), _sentence(fact)) for fact in chosen], [(prefix, False), (answer, True)]


def multi_needle(tokenizer: Any, rng: random.Random, depth: float | None, length: int) -> tuple[Statements, list[Part]]:
    """Four facts, all of them queried, one after the other; all must be right."""
    facts = draw_facts(tokenizer, rng, NEEDLES)
    statements = [(rng.random(), _sentence(fact)) for fact in facts]
    query: list[Part] = []
    for prefix, answer, end in rng.sample(facts, len(facts)):
        query += [(prefix, False), (answer, True), (end + encode(tokenizer, "\n\n"), False)]
    return statements, query[:-1]


def variables(tokenizer: Any, rng: random.Random, depth: float | None, length: int) -> tuple[Statements, list[Part]]:
    """Variables that take their value from one another; all that have one value are queried, in the order of the chain."""
    names, statements = rng.sample(NOUNS, 2 * CHAIN), []
    values = rng.sample(range(10_000, 100_000), 2)
    for value, chain in zip(values, (names[:CHAIN], names[CHAIN:]), strict=True):
        sources = [str(value), *(f"VAR {name}" for name in chain)]
        depths = sorted(rng.random() for _ in chain)
        lines = (f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=False))
        statements += [(where, encode(tokenizer, line)) for where, line in zip(depths, lines, strict=True)]
    question = f"The variables whose value is {values[0]}, each assigned from the one before, are VAR"
    return statements, [(encode(tokenizer, question), False), (encode(tokenizer, " " + ", VAR ".join(names[:CHAIN])), True)]


def counting(tokenizer: Any, rng: random.Random, depth: float | None, length: int) -> tuple[Statements, list[Part]]:
    """How often was one of two things said? From 1 to 9 times, so guessing is right in a ninth of the rows."""
    things = [f"{adjective} {noun}" for adjective, noun in zip(rng.sample(ADJECTIVES, 2), rng.sample(NOUNS, 2), strict=True)]
    counts = [rng.randint(1, MOST_COUNTED) for _ in things]
    line = "Here is the {}."
    statements = [
        (rng.random(), encode(tokenizer, line.format(thing)))
        for thing, count in zip(things, counts, strict=True)
        for _ in range(count)
    ]
    question = f'The number of times that "{line.format(things[0])}" was said is'
    return statements, [(encode(tokenizer, question), False), (encode(tokenizer, f" {counts[0]}"), True)]


MAKERS: dict[str, Maker] = {
    "passkey": passkey,
    "key-value": key_value,
    "multi-needle": multi_needle,
    "variables": variables,
    "counting": counting,
}
BY_DEPTH = ("passkey",)  # tasks whose rows are made at every depth; the others draw theirs


def make_rows(
    task: str,
    tokenizer: Any,
    filler: Sequence[int],
    length: int,
    count: int,
    seed: int,
    depth: float | None = None,
    bos: bool | None = None,
) -> RecallBatch:
    """Rows of one task, each of `length` tokens.

    filler: token ids of running text. depth: of the queried fact, from 0, the beginning, to 1, just before the question; None
    draws it. bos: like that of `start_tokens`. Raises TextError where the length leaves no space.
    """
    start = start_tokens(tokenizer, bos)
    rng = random.Random(f"{task}-{length}-{depth}-{seed}")
    rows = [woven(tokenizer, filler, start, length, MAKERS[task](tokenizer, rng, depth, length), rng) for _ in range(count)]
    ids, answers = zip(*rows, strict=True)
    return RecallBatch(
        torch.tensor(ids, dtype=torch.int64, device="cpu"), torch.tensor(answers, dtype=torch.bool, device="cpu")
    )


def _sentence(fact: tuple[list[int], ...]) -> list[int]:
    return list(itertools.chain(*fact))


def woven(
    tokenizer: Any,
    filler: Sequence[int],
    start: list[int],
    length: int,
    made: tuple[Statements, list[Part]],
    rng: random.Random,
) -> tuple[list[int], list[bool]]:
    """One row's token ids and which of them are answers: running text, with paragraphs where they belong, and the question."""
    statements, query = made
    gap = encode(tokenizer, "\n\n")
    needed = len(start) + sum(2 * len(gap) + len(paragraph) for _, paragraph in statements) + len(gap)
    free = length - needed - sum(len(ids) for ids, _ in query)
    if free < 0:
        raise TextError(f"{length} tokens are too few for this task with this tokenizer; give lengths from {length - free}.")
    text = cycle(filler, rng.randrange(len(filler)), free)
    ids, done = list(start), 0
    for depth, paragraph in sorted(statements, key=lambda item: item[0]):
        stop = round(depth * free)
        ids += text[done:stop] + gap + paragraph + gap
        done = stop
    ids += text[done:] + gap
    answers = [False] * len(ids)
    for part, is_answer in query:
        ids += part
        answers += [is_answer] * len(part)
    return ids, answers
