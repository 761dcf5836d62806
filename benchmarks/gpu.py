"""Everything that is to be known of a GPU, in one call: `python -m benchmarks.gpu [--out FOLDER] [--minutes 8.5]`.

In this order: correctness of every recipe against the naive twin in float32 over odd shapes, and of single tokens that join a
cache by kernels, launch by launch and by a CUDA graph, against plain torch; the bandwidth of a copy; one
layer's attention of one token (32 query heads over 8 and over 32 KV heads of 128 channels) against torch's and others' over 16
bits, by CUDA graphs over inputs that exceed the L2, medians; appending; prompts; whole models (`benchmarks.gpu_model`). What
does not fit the time is left out and named. Results are written after each part, one JSON file for the card; the table in
`docs/gpu.md` is made of it by `tools/gpu_table.py`. `--tiny` runs every part once on small inputs, on a CPU by Triton's
interpreter (`TRITON_INTERPRET=1`), to see that the program works: its times mean nothing.
"""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

import narrowkv
from benchmarks import gpu_model, gpu_parts
from benchmarks.gpu_clock import bandwidth

RECIPES = ("nuq4-1%", "nuq3-1%", "nuq2-1%", "pair3", "pair2", "kivi-2", "kivi-4")
EVERY = (*RECIPES, "nuq4", "nuq3", "nuq2", "channel4", "channel3", "channel2", "pair3-1%", "pair2-1%", "int4", "int2", "fp16")
SHAPES = (
    (1000, 1, (32, 8), 1),
    (330, 3, (6, 2), 5),
    (2048, 2, (8, 8), 16),
    (700, 2, (8, 2), 65),
)  # tokens, batch, heads, queries
HEADS = ((32, 8), (32, 32))
LENGTHS = (2048, 4096, 8192, 32_768, 131_072, 524_288)
Part = Callable[[], Iterator[dict[str, Any]]]


class Report:
    """What was found so far, in one file that is written anew with each part."""

    def __init__(self, path: Path, facts: dict[str, Any], seconds: float):
        self.path = path
        self.found: dict[str, Any] = {"facts": facts, "left_out": []}
        self.until = time.monotonic() + seconds

    def run(self, name: str, part: Part) -> None:
        """Add the rows of a part until there are no more or time is up; a failure is noted and the next part goes on."""
        rows: list[dict[str, Any]] = []
        self.found[name] = rows
        try:
            for row in part():
                rows.append(row)
                print(name, json.dumps(row), flush=True)
                if time.monotonic() > self.until:
                    self.found["left_out"].append(f"{name}, after {len(rows)} rows: out of time")
                    break
        except Exception as error:  # a card's one call must not lose all for one kernel
            self.found["left_out"].append(f"{name}, after {len(rows)} rows: {type(error).__name__}: {str(error)[:500]}")
            print(self.found["left_out"][-1], flush=True)
        self.path.write_text(json.dumps(self.found, indent=2) + "\n", encoding="utf-8")


def facts(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date."""
    card = platform.processor() or platform.machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device).name
    versions = {"torch": torch.__version__, "triton": triton.__version__, "narrowkv": narrowkv.__version__}
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"card": card, "device": device.type, "date": date, "cuda": torch.version.cuda, **versions}


def correctness(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    shapes = ((130, 1, (2, 1), 1), (130, 2, (2, 1), 20)) if tiny else SHAPES
    for name in RECIPES[:2] if tiny else EVERY:
        for tokens, batch, heads, queries in shapes:
            yield gpu_parts.correctness(name, tokens, batch, heads, queries, device)


def decoding(device: torch.device, tiny: bool, copied: float) -> Iterator[dict[str, Any]]:
    cases = [((2, 1), 128, 1)] if tiny else [(heads, n, batch) for batch in (1, 16) for n in LENGTHS for heads in HEADS]
    for heads, tokens, batch in cases:
        if batch * tokens * heads[1] > 2**24:  # 64 GiB of keys and values in 16 bits for torch
            continue
        peers = gpu_parts.peers(tokens, batch, heads, device)
        torch_best = min(peers.values(), default=float("nan"))
        for name in RECIPES[:2] if tiny else RECIPES:
            row = gpu_parts.decoding(name, tokens, batch, heads, device, copied)
            yield {**row, "peers": peers, "ratio": torch_best / row["milliseconds"]}


def appending(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    for name in RECIPES[:2] if tiny else RECIPES:
        for batch, heads in ((1, (2, 1)),) if tiny else ((1, HEADS[0]), (16, HEADS[0])):
            yield gpu_parts.encoding(name, 128 if tiny else 8192, batch, heads, device, 2 if tiny else 128)


def prompts(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    for name in RECIPES[:1] if tiny else RECIPES:
        yield gpu_parts.prompts(name, 128 if tiny else 32_768, (2, 1) if tiny else HEADS[0], device)
        yield gpu_parts.whole_prompts(name, 128 if tiny else gpu_parts.PREFILL, (2, 1) if tiny else HEADS[0], device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument(
        "--parts", nargs="+", help="of correctness, steps, decoding, appending, prompts, models; all by default"
    )
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    if device.type != "cuda" and not arguments.tiny:
        parser.error("there is no GPU here; --tiny runs everything on small inputs by the interpreter")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = facts(device)
    name = "".join(c if c.isalnum() else "-" for c in known["card"]).strip("-").lower()
    copied = bandwidth(device)
    report = Report(
        arguments.out / f"gpu-{'tiny-' if arguments.tiny else ''}{name}.json", {**known, "copy_gigabytes_per_second": copied},
        60 * arguments.minutes,
    )  # fmt: skip
    tiny = arguments.tiny
    parts: dict[str, Part] = {
        "correctness": lambda: correctness(device, tiny),
        "steps": lambda: gpu_model.stepped(device, tiny),
        "decoding": lambda: decoding(device, tiny, copied),
        "appending": lambda: appending(device, tiny),
        "prompts": lambda: prompts(device, tiny),
        "models": lambda: gpu_model.rows(device, tiny),
    }
    for part, rows in parts.items():
        if not arguments.parts or part in arguments.parts:
            report.run(part, rows)
    print("left out:", report.found["left_out"] or "nothing")


if __name__ == "__main__":
    main()
