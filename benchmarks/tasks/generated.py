"""Greedy answers to short prompts, a batch at a time."""

from collections.abc import Sequence
from typing import Any

from benchmarks.tasks.caches import Kind, empty

BATCH = 12


def completions(
    model: Any, tokenizer: Any, prompts: Sequence[str], kind: Kind, new_tokens: int, stops: Sequence[str]
) -> list[str]:
    """Greedy completions of prompts, as in use: a prompt attends exactly to itself, what is generated to the packed prompt.

    new_tokens: generated at most. stops: texts before which an answer ends.
    """
    found = []
    for start in range(0, len(prompts), BATCH):
        inputs = tokenizer(list(prompts[start : start + BATCH]), return_tensors="pt", padding=True, padding_side="left")
        ids = model.generate(
            **inputs,
            past_key_values=empty(model, kind),
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            stop_strings=list(stops),
            tokenizer=tokenizer,
        )
        new = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [min((text.split(stop)[0] for stop in stops), key=len) for text in new]
    return found
