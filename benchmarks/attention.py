"""Decode attention over the packed cache against torch's over 16 and 32 bits: `python -m benchmarks.attention [--json FILE]`.

One token of 32 query heads over 8 KV heads of 128 channels, one layer, keys stored before the rotary embedding where the
recipe does so, tables drawn at random. The peer is the best of three torch forms (sdpa with `enable_gqa`, the query heads of a
group as rows of sdpa, matmul-softmax-matmul) in the same run: all take turns, and medians are compared. Bandwidth is that of a
sum over 256 MiB, in the same turns; the share is packed bytes read a second over it.
`--avx2` measures what a processor with AVX2 alone would: our kernel for it, against torch limited to the same, in a process of
its own, and against torch as this machine runs it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.drawn import HEAD_DIM, KV_HEADS, QUERY_HEADS, attention_inputs, fill
from benchmarks.running import CLOCKS, medians, options, write
from narrowkv.attention.cpu import decode as cpu

RECIPES = ("narrow4", "narrow3", "narrow2", "nuq4-1%", "nuq3-1%", "nuq2-1%", "kivi-2")
BANDWIDTH_BYTES = 2**28
# each of the libraries that torch computes with looks at its own, once; with the first alone matrices are still those of AMX
AVX2_ALONE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def ours(
    name: str, tokens: int, batch: int = 1, kernel: str | None = None, avx2: bool = False
) -> tuple[Callable[[], Tensor], int]:
    """One step of decoding as the cache calls it, and the bytes that it reads.

    kernel: by default what would be chosen here, or, if `avx2`, on a processor with AVX2 alone.
    """
    store = fill(name, tokens, batch)
    if avx2 and kernel is None:
        streams = all(quantizer.scheme.datatype == "trellis" for quantizer in store.quantizers)
        kernel = cpu.AVX2_INT16 if streams else "avx2"
    keys, values = torch.randn(2, batch, KV_HEADS, 1, HEAD_DIM)
    query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16)
    inputs = attention_inputs(store, query, (keys, values))
    parts = store.parts()
    read = sum(part.nbytes for kind in ("codes", "scales", "outliers") for part in parts[kind])
    return lambda: cpu.attend(inputs, store, kernel), read


def torch_forms(tokens: int, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Three ways in which torch computes the same over a cache that is not packed."""
    query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, dtype=dtype)
    keys, values = (torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, dtype=dtype) for _ in range(2))
    rows = query.view(batch, KV_HEADS, -1, HEAD_DIM)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    kind = str(dtype).removeprefix("torch.")
    return {
        f"sdpa enable_gqa {kind}": lambda: sdpa(query, keys, values, enable_gqa=True),
        f"sdpa rows {kind}": lambda: sdpa(rows, keys, values),
        f"matmul {kind}": lambda: ((rows * HEAD_DIM**-0.5) @ keys.transpose(2, 3)).softmax(-1) @ values,
    }


def measure(
    recipes: list[str],
    tokens: int,
    batch: int,
    threads: int,
    repeats: int,
    kernel: str | None = None,
    avx2: bool = False,
    clock: str = "wall",
) -> list[dict[str, Any]]:
    """One row for each recipe."""
    torch.set_num_threads(threads)
    made = {name: ours(name, tokens, batch, kernel, avx2) for name in recipes}
    peers = {kind: torch_forms(tokens, batch, getattr(torch, kind)) for kind in ("bfloat16", "float32")}
    block = torch.ones(BANDWIDTH_BYTES // 4)
    steps: dict[str, Callable[[], Any]] = {"read": block.sum, **{name: step for name, (step, _) in made.items()}}
    for forms in peers.values():
        steps.update(forms)
    found = medians(steps, repeats, CLOCKS[clock])
    bandwidth = BANDWIDTH_BYTES / found["read"]
    best = {kind: min(forms, key=lambda name: found[name]) for kind, forms in peers.items()}
    return [
        {
            "recipe": name,
            "tokens": tokens,
            "batch": batch,
            "threads": threads,
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
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


def limited(arguments: list[str]) -> list[dict[str, Any]]:
    """Rows of a process with these arguments, and their printed lines, in which torch uses AVX2 alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.attention", *arguments, "--json", str(path)]
        subprocess.run(command, env=os.environ | AVX2_ALONE, check=True)
        return json.loads(path.read_text(encoding="utf-8"))["rows"]


def main() -> None:
    parser = options(__doc__, RECIPES, repeats=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument(
        "--kernel", choices=[cpu.INT16, cpu.AVX2_INT16, *cpu.KERNELS], help="in place of the one that would be chosen"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for one thread on a machine in use")
    parser.add_argument("--avx2", action="store_true", help="our kernel for AVX2, against torch with AVX2 alone and as it is")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    on_avx2 = limited(sys.argv[1:]) if arguments.avx2 and AVX2_ALONE.items() - os.environ.items() else []
    cases = [(n, batch, threads) for n in arguments.tokens for batch in arguments.batch for threads in arguments.threads]
    for tokens, batch, threads in cases:
        how = (arguments.repeats, arguments.kernel, arguments.avx2, arguments.clock)
        found = measure(arguments.recipes, tokens, batch, threads, *how)
        rows += found
        for row in found:
            print(
                f"{row['recipe']:>8}  {batch} x {tokens:6d} tokens  {threads} threads  {row['milliseconds']:7.2f} ms  "
                f"{row['ratio_bfloat16']:5.1f} x torch ({row['torch_uses']}) bf16 ({row['milliseconds_bfloat16']:.2f} ms)  "
                f"{row['ratio_float32']:5.1f} x fp32  {row['packed_gigabytes_per_second']:5.1f} GB/s, "
                f"{100 * row['share_of_bandwidth']:.0f}% of {row['bandwidth_gigabytes_per_second']:.1f}",
                flush=True,
            )
    write(
        arguments.json,
        on_avx2 + rows,
        kernel=arguments.kernel or f"as chosen for queries in bf16{' on AVX2' * arguments.avx2}",
        repeats=arguments.repeats,
        clock=arguments.clock,
    )


if __name__ == "__main__":
    main()
