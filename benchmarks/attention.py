"""Decode attention over the packed cache against torch's over 16 and 32 bits: `python -m benchmarks.attention [--json FILE]`.

One token of 32 query heads over 8 KV heads of 128 channels, one layer, keys stored before the rotary embedding where the
recipe does so, tables drawn at random. The peer is the best of three torch forms (sdpa with `enable_gqa`, the query heads of a
group as rows of sdpa, matmul-softmax-matmul) in the same run: all take turns, and medians are compared. Bandwidth is that of a
sum over 256 MiB, in the same turns; the share is packed bytes read a second over it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.running import medians, options, write
from narrowkv import get_recipe
from narrowkv.attention import Rope, Visible, cpu
from narrowkv.codec import AnyQuantizer, Encoded, Quantizer, Scheme, quantizer_for
from narrowkv.store import LayerStore

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RECIPES = ("nuq4-1%", "nuq3-1%", "nuq2-1%", "kivi-2", "pair2", "pair3")
BANDWIDTH_BYTES = 2**28


def random_quantizer(scheme: Scheme) -> AnyQuantizer:
    """A scheme with tables that fit normal numbers about as learned ones would."""
    levels = 2**scheme.code_bits
    if scheme.codebook != "layer":
        codes = HEAD_DIM // scheme.numbers
        turn = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM)).Q.half() if scheme.turn else None
        return quantizer_for(
            scheme,
            points=torch.randn(KV_HEADS, codes, levels, scheme.numbers).half(),
            weight=torch.ones(KV_HEADS, codes, scheme.numbers),
            limit=torch.ones(1) if scheme.outliers else None,
            turn=turn,
        )
    tables: dict[str, Tensor] = {}
    if scheme.datatype == "nuq":
        tables["codebook"] = torch.linspace(-1, 1, levels)
    if scheme.static:
        tables["zero"] = torch.zeros(KV_HEADS, HEAD_DIM)
        tables["upper"] = torch.full((KV_HEADS, HEAD_DIM), 2.576)  # 1% of normal numbers lie beyond
        tables["scale"], tables["lower"] = tables["upper"], -tables["upper"]
    return Quantizer(scheme, **tables)


def draw_codes(scheme: Scheme, x: Tensor, skip: Tensor | None = None) -> Encoded:
    """Codes at random, in place of the nearest points."""
    codes = HEAD_DIM // scheme.numbers
    return Encoded(torch.randint(2**scheme.code_bits, (*x.shape[:3], codes), dtype=torch.uint8))


@contextlib.contextmanager
def draw_at_random(store: LayerStore) -> Iterator[None]:
    """Within, points are not searched for: codes of pairs are drawn."""
    searching = [quantizer for quantizer in store.quantizers if quantizer.scheme.codebook != "layer"]
    for quantizer in searching:
        object.__setattr__(quantizer, "encode", functools.partial(draw_codes, quantizer.scheme))
    yield
    for quantizer in searching:
        object.__delattr__(quantizer, "encode")


def fill(name: str, tokens: int) -> LayerStore:
    """A store with random numbers."""
    recipe = get_recipe(name)
    store = LayerStore(random_quantizer(recipe.keys), random_quantizer(recipe.values), recipe.sinks, recipe.window)
    with draw_at_random(store):
        for start in range(0, tokens, 4096):
            chunk = torch.randn(2, 1, KV_HEADS, min(4096, tokens - start), HEAD_DIM)
            store.append(chunk[0], chunk[1])
    return store


def asking(store: LayerStore, past: int, new: tuple[Tensor, ...]) -> dict[str, Any]:
    """What `attend` is told beside queries and store: of `past` tokens held, and keys and values of new ones."""
    pre_rope = store.quantizers[0].scheme.pre_rope
    rope = Rope(1 / 10_000 ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
    return {
        "past": past,
        "new": new,
        "rope": rope if pre_rope else None,
        "kept": torch.arange(past, dtype=torch.int32)[None] if pre_rope else None,
        "visible": Visible(),
        "scaling": HEAD_DIM**-0.5,
    }


def ours(name: str, tokens: int) -> tuple[Callable[[], Tensor], int]:
    """One step of decoding as the cache calls it, and the bytes that it reads."""
    store = fill(name, tokens)
    options = asking(store, tokens, tuple(torch.randn(2, 1, KV_HEADS, 1, HEAD_DIM)))
    query = torch.randn(1, QUERY_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16)
    held = store.parts()
    read = sum(part.nbytes for kind in ("codes", "scales", "outliers") for part in held[kind])
    return lambda: cpu.attend(query, store, **options), read


def torch_forms(tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Three ways in which torch computes the same over a cache that is not packed."""
    query = torch.randn(1, QUERY_HEADS, 1, HEAD_DIM, dtype=dtype)
    keys, values = (torch.randn(1, KV_HEADS, tokens, HEAD_DIM, dtype=dtype) for _ in range(2))
    rows = query.view(1, KV_HEADS, -1, HEAD_DIM)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    kind = str(dtype).removeprefix("torch.")
    return {
        f"sdpa enable_gqa {kind}": lambda: sdpa(query, keys, values, enable_gqa=True),
        f"sdpa rows {kind}": lambda: sdpa(rows, keys, values),
        f"matmul {kind}": lambda: ((rows * HEAD_DIM**-0.5) @ keys.transpose(2, 3)).softmax(-1) @ values,
    }


def measure(recipes: list[str], tokens: int, threads: int, turns: int) -> list[dict[str, Any]]:
    """One row for each recipe."""
    torch.set_num_threads(threads)
    made = {name: ours(name, tokens) for name in recipes}
    peers = {kind: torch_forms(tokens, getattr(torch, kind)) for kind in ("bfloat16", "float32")}
    block = torch.ones(BANDWIDTH_BYTES // 4)
    steps: dict[str, Callable[[], Any]] = {"read": block.sum, **{name: step for name, (step, _) in made.items()}}
    for forms in peers.values():
        steps.update(forms)
    found = medians(steps, turns)
    bandwidth = BANDWIDTH_BYTES / found["read"]
    best = {kind: min(forms, key=lambda name: found[name]) for kind, forms in peers.items()}
    return [
        {
            "recipe": name,
            "tokens": tokens,
            "threads": threads,
            "milliseconds": 1e3 * found[name],
            "packed_gigabytes_per_second": read / found[name] / 1e9,
            "bandwidth_gigabytes_per_second": bandwidth / 1e9,
            "share_of_bandwidth": read / found[name] / bandwidth,
            **{f"ratio_{kind}": found[form] / found[name] for kind, form in best.items()},
            **{f"best_{kind}": form for kind, form in best.items()},
            **{f"milliseconds_{kind}": 1e3 * found[form] for kind, form in best.items()},
        }
        for name, (_, read) in made.items()
    ]


def main() -> None:
    parser = options(__doc__, RECIPES, turns=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 2048])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for tokens in arguments.tokens:
        for threads in arguments.threads:
            rows += measure(arguments.recipes, tokens, threads, arguments.turns)
            for row in rows[-len(arguments.recipes) :]:
                print(
                    f"{row['recipe']:>8}  {tokens:6d} tokens  {threads} threads  {row['milliseconds']:7.2f} ms  "
                    f"{row['ratio_bfloat16']:5.1f} x torch bf16 ({row['milliseconds_bfloat16']:.2f} ms)  "
                    f"{row['ratio_float32']:5.1f} x fp32  {row['packed_gigabytes_per_second']:5.1f} GB/s, "
                    f"{100 * row['share_of_bandwidth']:.0f}% of {row['bandwidth_gigabytes_per_second']:.1f}",
                    flush=True,
                )
    write(arguments.json, rows, kernel=cpu.KERNELS[0])


if __name__ == "__main__":
    main()
