"""The next lines of long source files, one after another (in the manner of LCC and RepoBench-P, arXiv 2308.14508)."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.real_models import code
from benchmarks.tasks.caches import Kind, copied, filled, read
from narrowkv.evaluate.windows import encode, start_tokens

NAME = "completion"
MODULES = (("_pydecimal", "mailbox", "subprocess", "zipfile"), ("turtle", "typing", "tarfile", "inspect"))
LINES, SHORTEST = 40, 4  # lines for each prompt, tokens of one


def lines(tokenizer: Any, ids: list[int]) -> Iterator[list[int]]:
    """Token ids up to and with each that ends a line."""
    line: list[int] = []
    for token in ids:
        line.append(token)
        if "\n" in tokenizer.decode([token]):
            yield line
            line = []


@torch.inference_mode()
def completed(model: Any, cache: Any, last: int, following: list[list[int]]) -> list[bool]:
    """Whether each token of each line of at least `SHORTEST` is the most likely one after those before it.

    cache: of the prompt; it grows line by line. last: the token behind it, with which the first line is predicted.
    """
    found = []
    for line in following:
        logits = model(torch.tensor([[last, *line[:-1]]]), past_key_values=cache, use_cache=True).logits[0]
        last = line[-1]
        if len(line) >= SHORTEST:
            found.append(logits.argmax(-1).tolist() == line)
    return found[:LINES]


def outcomes(model: Any, tokenizer: Any, length: int, kinds: dict[str, Kind]) -> dict[str, list[bool]]:
    """Of each kind of cache, which lines are completed. A prompt is read once, and packed as each kind does."""
    found: dict[str, list[bool]] = {name: [] for name in kinds}
    for modules in MODULES:
        ids = [*start_tokens(tokenizer), *encode(tokenizer, code(modules))]
        last, *behind = ids[length : length + 40 * LINES]
        following = list(lines(tokenizer, behind))
        following = following[: enough(following)]
        exact = read(model, torch.tensor([ids[:length]]))
        for name, kind in kinds.items():
            found[name] += completed(model, copied(filled(model, kind, exact)), last, following)
    return found


def enough(following: list[list[int]]) -> int:
    """How many lines must be given until `LINES` of them count."""
    counted = 0
    for i, line in enumerate(following, 1):
        counted += len(line) >= SHORTEST
        if counted == LINES:
            return i
    return len(following)
