"""Passwords stated in running text, each asked for behind the same long prompt (in the manner of RULER, arXiv 2404.06654)."""

import random
from typing import Any

import torch

from benchmarks.real_models import SCORE
from benchmarks.tasks.caches import Kind, copied, filled, read
from narrowkv.evaluate.retrieval import draw_facts
from narrowkv.evaluate.sources import read_text
from narrowkv.evaluate.task_rows import woven
from narrowkv.evaluate.windows import encode, start_tokens

NAME = "retrieval"
FACTS, PROMPTS = 20, 2


def prompt(tokenizer: Any, filler: list[int], length: int, seed: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Token ids with facts at depths drawn at random, and each fact's question and answer."""
    rng = random.Random(f"{NAME}-{length}-{seed}")
    facts = draw_facts(tokenizer, rng, FACTS)
    statements = [((i + rng.random()) / FACTS, [*begin, *answer, *end]) for i, (begin, answer, end) in enumerate(facts)]
    ids, _ = woven(tokenizer, filler, start_tokens(tokenizer), length, (statements, []), rng)
    return ids, [(begin, answer) for begin, answer, _ in facts]


@torch.inference_mode()
def is_right(model: Any, cache: Any, question: list[int], answer: list[int]) -> bool:
    """Whether each token of the answer is the most likely one after those before it, behind a copy of a cache."""
    logits = model(torch.tensor([question + answer]), past_key_values=copied(cache), use_cache=True).logits[0]
    return logits[len(question) - 1 : -1].argmax(-1).tolist() == answer


def outcomes(model: Any, tokenizer: Any, length: int, kinds: dict[str, Kind]) -> dict[str, list[bool]]:
    """Of each kind of cache, whether each question is answered. A prompt is read once, and packed as each kind does."""
    filler = encode(tokenizer, read_text(SCORE))
    found: dict[str, list[bool]] = {name: [] for name in kinds}
    for seed in range(PROMPTS):
        ids, questions = prompt(tokenizer, filler, length, seed)
        exact = read(model, torch.tensor([ids]))
        for name, kind in kinds.items():
            cache = filled(model, kind, exact)
            found[name] += [is_right(model, cache, *question) for question in questions]
    return found
