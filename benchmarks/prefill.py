"""Reading a prompt into the packed cache against torch's attention over 16 and 32 bits: `python -m benchmarks.prefill`.

One layer of 32 query heads over 8 KV heads of 128 channels, tables drawn at random as in `benchmarks.drawn`: appending the
new tokens and attending to them and to the past. A prompt in one go is attended to by the model's own attention, as the cache
does it, so that what differs is appending; a chunk behind a past goes to backend `cpu`. The peer concatenates as DynamicCache
does, then takes the best of torch's forms in the same run: all take turns, and medians are compared. Turning the new queries
and keys, which both need, is left out.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.drawn import HEAD_DIM, KV_HEADS, QUERY_HEADS, attention_inputs, fill
from benchmarks.running import CLOCKS, Clock, medians, options, parse_with_clock, write
from narrowkv.attention.cpu import decode as cpu

RECIPES = ("narrow4", "narrow3", "narrow2", "nuq4-1%", "nuq2-1%", "kivi-2")
NEW = {0: 4096, 30_720: 2048}  # tokens behind so many
sdpa = torch.nn.functional.scaled_dot_product_attention


def draw(new: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of new tokens."""
    query = torch.randn(1, QUERY_HEADS, new, HEAD_DIM, dtype=dtype)
    keys, values = torch.randn(2, 1, KV_HEADS, new, HEAD_DIM, dtype=dtype)
    return query, keys, values


def ours(name: str, past: int, new: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One chunk as the cache reads it, into a copy that shares the blocks of the past."""
    before = fill(name, past, dtype=dtype)
    query, keys, values = draw(new, dtype)
    inputs = attention_inputs(before, query, (keys, values))

    def run() -> Tensor:
        store = copy.deepcopy(before)
        store.append(keys, values)
        if past:
            return cpu.attend(inputs, store)
        return sdpa(query, keys, values, is_causal=True, enable_gqa=True)

    return run


def torch_forms(past: int, new: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The same over a cache that is not packed: the heads of a group given to torch, or repeated for it."""
    query, keys, values = draw(new, dtype)
    stored = torch.randn(2, 1, KV_HEADS, past, HEAD_DIM, dtype=dtype)
    seen = torch.ones(new, past + new, dtype=torch.bool).tril(past) if past else None

    def run(repeats: int) -> Tensor:
        both = (torch.cat(side, dim=2) for side in ((stored[0], keys), (stored[1], values)))
        wide_keys, wide_values = (side.repeat_interleave(repeats, dim=1) if repeats > 1 else side for side in both)
        return sdpa(query, wide_keys, wide_values, attn_mask=seen, is_causal=seen is None, enable_gqa=True)

    return {"enable_gqa": lambda: run(1), "repeated heads": lambda: run(QUERY_HEADS // KV_HEADS)}


def measure(recipes: list[str], past: int, new: int, dtype: torch.dtype, repeats: int, clock: Clock) -> list[dict[str, Any]]:
    """One row for each recipe."""
    forms = torch_forms(past, new, dtype)
    found = medians({**{name: ours(name, past, new, dtype) for name in recipes}, **forms}, repeats, clock)
    best = min(forms, key=lambda name: found[name])
    return [
        {
            "recipe": name,
            "past": past,
            "new": new,
            "dtype": str(dtype).removeprefix("torch."),
            "milliseconds": 1e3 * found[name],
            "milliseconds_torch": 1e3 * found[best],
            "best_torch": best,
            "ratio": found[name] / found[best],
        }
        for name in recipes
    ]


def main() -> None:
    parser = options(__doc__, RECIPES, repeats=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--past", type=int, nargs="+", choices=NEW, default=list(NEW))
    arguments = parse_with_clock(parser)
    rows = []
    for dtype in arguments.dtypes:
        for past in arguments.past:
            new, clock = NEW[past], CLOCKS[arguments.clock]
            for row in measure(arguments.recipes, past, new, getattr(torch, dtype), arguments.repeats, clock):
                rows.append(row)
                print(
                    f"{row['recipe']:>8}  {new} tokens behind {past}  {dtype:>8}  {row['milliseconds']:7.0f} ms, "
                    f"{row['ratio']:.2f} times torch ({row['milliseconds_torch']:.0f} ms, {row['best_torch']})",
                    flush=True,
                )
    write(arguments.json, rows, repeats=arguments.repeats, threads=arguments.threads, clock=arguments.clock)


if __name__ == "__main__":
    main()
