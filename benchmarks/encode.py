"""What appending to the packed cache costs: `python -m benchmarks.encode [--json FILE]`.

One layer of 8 KV heads of 128 channels, keys and values, tables drawn at random as in `benchmarks.drawn`. Decoding: one
token at a time behind 8,192 others, the mean of 128, so that two blocks are sealed. Prefill: 2,048 tokens at a time. The peer
is the same store with the references in plain torch (but for the search of streams), in the same run: all take turns, and
medians are compared. The share is that of one step of attention over 8,192 tokens (32 query heads).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.attention import RECIPES, ours
from benchmarks.drawn import HEAD_DIM, KV_HEADS, random_quantizer
from benchmarks.running import medians, options, write
from narrowkv import get_recipe
from narrowkv.attention.cpu import decode as cpu
from narrowkv.codec import packing
from narrowkv.codec.cpu.encode import Encoder
from narrowkv.codec.cpu.encode_streams import StreamEncoder
from narrowkv.store import LayerStore

CONTEXT, PREFILL, DECODED = 8192, 2048, 128


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within, compiled forms give way to their references."""
    with ExitStack() as stack:
        for encoder in (Encoder, StreamEncoder):
            stack.enter_context(patch.object(encoder, "write", return_value=None))
        stack.enter_context(patch("narrowkv.codec.cpu.encode.KINDS", {}))  # of `require_finite`
        stack.enter_context(patch("narrowkv.store.page.pack", packing.pack_naive))
        yield


def appending(name: str, stored: int, chunks: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Appends keys and values [1, kv_heads, new, head_dim] chunk by chunk to a store of `stored` tokens."""
    recipe = get_recipe(name)
    store = LayerStore(random_quantizer(recipe.keys), random_quantizer(recipe.values), recipe.sinks, recipe.residual_length)
    if stored:
        store.append(*torch.randn(2, 1, KV_HEADS, stored, HEAD_DIM))

    def run() -> None:
        for keys, values in chunks:
            store.append(keys, values)
        store.evict(store.length - stored) if stored else store.reset()

    return run


def in_plain_torch(step: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        with plain_torch():
            step()

    return run


def measure(name: str, threads: int, repeats: int) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(threads)
    tokens = [(keys, values) for keys, values in torch.randn(DECODED, 2, 1, KV_HEADS, 1, HEAD_DIM).unbind()]
    prompt = [(keys, values) for keys, values in torch.randn(1, 2, 1, KV_HEADS, PREFILL, HEAD_DIM).unbind()]
    decode, prefill = appending(name, CONTEXT, tokens), appending(name, 0, prompt)
    attention, _ = ours(name, CONTEXT)
    steps: dict[str, Callable[[], Any]] = {"decode": decode, "prefill": prefill, "attention": attention}
    found = medians(steps | {f"{kind} torch": in_plain_torch(steps[kind]) for kind in ("decode", "prefill")}, repeats)
    return {
        "recipe": name,
        "threads": threads,
        "microseconds_per_token": 1e6 * found["decode"] / DECODED,
        "microseconds_per_token_torch": 1e6 * found["decode torch"] / DECODED,
        "ratio_decode": found["decode torch"] / found["decode"],
        "prefill_tokens_per_second": PREFILL / found["prefill"],
        "prefill_tokens_per_second_torch": PREFILL / found["prefill torch"],
        "ratio_prefill": found["prefill torch"] / found["prefill"],
        "attention_milliseconds": 1e3 * found["attention"],
        "share_of_attention": found["decode"] / DECODED / found["attention"],
    }


def main() -> None:
    parser = options(__doc__, RECIPES, repeats=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for threads in arguments.threads:
        for name in arguments.recipes:
            row = measure(name, threads, arguments.repeats)
            rows.append(row)
            print(
                f"{name:>8}  {threads} threads  decoding {row['microseconds_per_token']:6.1f} us a token "
                f"({row['ratio_decode']:.1f} x torch), {100 * row['share_of_attention']:.1f}% of attention "
                f"({row['attention_milliseconds']:.2f} ms)  prefill {row['prefill_tokens_per_second']:8.0f} tokens/s "
                f"({row['ratio_prefill']:.1f} x torch)",
                flush=True,
            )
    write(arguments.json, rows, kernel=cpu.KERNELS[0])


if __name__ == "__main__":
    main()
