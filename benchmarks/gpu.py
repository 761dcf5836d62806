"""Everything that is to be known of a GPU, in one call: `python -m benchmarks.gpu [--out FOLDER] [--minutes 8.5]`.

In this order: correctness of every recipe against the naive reference in float32 over odd shapes, and of single tokens that
join a cache by kernels, launch by launch and by a CUDA graph, against plain torch; the bandwidth of a copy; one
layer's attention of one token (32 query heads over 8 and over 32 KV heads of 128 channels) against torch's and others' over 16
bits, by CUDA graphs over inputs that exceed the L2, medians; appending; prompts; whole models (`benchmarks.gpu_model`).

Recipes are checked side by side, by a process each, since compiling takes longest; these also compile what is timed later.
Each part may take its share of the time that is left; what does not fit is named. A row that fails is named and the next one
goes on, in another process where the GPU itself has failed. Results are written after each row, a JSON file for the card; the
table in `docs/gpu.md` is made of it by `tools/gpu_table.py`. `--tiny` runs every part once on small inputs, on a CPU by
Triton's interpreter (`TRITON_INTERPRET=1`), to see that the program works: its times mean nothing.
"""

import argparse
import contextlib
import datetime
import functools
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

import narrowkv
from benchmarks import gpu_model, gpu_parts
from benchmarks.gpu_clock import bandwidth
from benchmarks.gpu_parts import Row, Rows

RECIPES = ("narrow3", "nuq4-1%", "narrow2", "narrow4", "nuq2-1%", "kivi-2")
EVERY = (*RECIPES, "nuq3-1%", "kivi-4", "nuq4", "nuq2", "int4", "fp16")
SHAPES = (
    (1000, 1, (32, 8), 1),
    (330, 3, (6, 2), 5),
    (2048, 2, (8, 8), 16),
    (700, 2, (8, 2), 65),
)  # tokens, batch, heads, queries
HEADS = ((32, 8), (32, 32))
LENGTHS = (32_768, 131_072, 8192, 2048, 4096, 524_288)  # what is asked most comes first
SHARES = {"correctness": 5, "steps": 1, "decoding": 5, "appending": 1, "prompts": 2, "models": 6}  # of the time
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-2}


class Report:
    """What was found so far, in one file that is written anew with each row."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

    def run(self, name: str, rows: Rows, until: float) -> None:
        """Add the rows of a part until there are no more, or `time.time` is `until`; a row that fails is named.

        Raises SystemExit where the GPU has failed, so that nothing more can be done in this process.
        """
        done: list[Row] = []
        self.found[name] = done
        label = "nothing"
        while (now := time.time()) < until:
            try:
                label = f"after {label}"
                label, make = next(rows, (label, None))
                if make is None:
                    break
                done.append({**make(), "seconds": round(time.time() - now, 1)})
                print(name, json.dumps(done[-1]), flush=True)
            except Exception as error:  # a card's one call must not lose all for one kernel
                self.leave_out(f"{name}, {label}: {type(error).__name__}: {str(error)[:500]}")
                if torch.cuda.is_available():
                    _require_gpu()
            self.write()
        else:
            self.leave_out(f"{name}, after {label}: out of time")

    def leave_out(self, what: str) -> None:
        print(what, flush=True)
        self.found["left_out"].append(what)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=2) + "\n", encoding="utf-8")


def _require_gpu() -> None:
    """Raises SystemExit where a kernel has failed in such a way that nothing runs after it."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(f"The GPU has failed: {error}") from error


def facts(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date."""
    card = platform.processor() or platform.machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device).name
    versions = {"torch": torch.__version__, "triton": triton.__version__, "narrowkv": narrowkv.__version__}
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"card": card, "device": device.type, "date": date, "cuda": torch.version.cuda, **versions}


def side_by_side(task: Callable[[str, bool], Row], names: tuple[str, ...], tiny: bool, until: float) -> Rows:
    """The row of a task for each name, by a process each, which are ended when they are not done until then."""
    with multiprocessing.get_context("spawn").Pool(len(names), maxtasksperchild=1) as pool:
        found = {name: pool.apply_async(task, (name, tiny)) for name in names}
        for name, row in found.items():
            yield name, functools.partial(row.get, max(until - time.time(), 1))


def checked(name: str, tiny: bool) -> Row:
    """Errors of a recipe over all shapes; then its kernels are compiled for what is timed later."""
    device = begin(tiny)
    shapes = ((130, 1, (2, 1), 1), (130, 2, (2, 1), 20)) if tiny else SHAPES
    each = [gpu_parts.correctness(name, tokens, batch, heads, queries, device) for tokens, batch, heads, queries in shapes]
    kinds = [kind for kind in TOLERANCES if kind in each[0]]
    worst = {kind: torch.tensor([row[kind] for row in each]).amax().item() for kind in kinds}
    right = all(worst[kind] < TOLERANCES[kind] for kind in kinds)
    if name in RECIPES and not tiny:
        with contextlib.suppress(Exception):  # what fails here fails again where it is timed, and is named there
            compile_all(name, device)
    return {"recipe": name, **worst, "right": right, "each": each}


def compile_all(name: str, device: torch.device) -> None:
    """Run once, on few tokens, what other parts time."""
    for heads in HEADS:
        for batch in (1, 16):
            gpu_parts.decoding(name, 2048, batch, heads, device, 1.0)
    gpu_parts.encoding(name, 2048, 1, HEADS[0], device)
    gpu_parts.prompts(name, 4096, HEADS[0], device)
    gpu_parts.whole_prompts(name, gpu_parts.PREFILL, HEADS[0], device)


def stepped(name: str, tiny: bool) -> Row:
    return gpu_model.stepped(name, begin(tiny), tiny)


def decoding(device: torch.device, tiny: bool, copied: float) -> Rows:
    cases = [((2, 1), 128, 1)] if tiny else [(heads, n, batch) for n in LENGTHS for batch in (1, 16) for heads in HEADS]
    for heads, tokens, batch in cases:
        if batch * tokens * heads[1] > 2**24:  # 8 GiB of keys and values in 16 bits for torch
            continue
        peers = functools.cache(functools.partial(gpu_parts.peers, tokens, batch, heads, device))
        for name in RECIPES[:2] if tiny else RECIPES:
            label = f"{name}, {heads[0]}/{heads[1]} heads, {batch} x {tokens} tokens"
            yield label, functools.partial(against, peers, name, tokens, batch, heads, device, copied)


def against(peers: Callable[[], dict[str, float]], *case: Any) -> Row:
    """Decoding, and how many times as fast as the best peer it is."""
    times, row = peers(), gpu_parts.decoding(*case)
    return {**row, "peers": times, "ratio": min(times.values(), default=float("nan")) / row["milliseconds"]}


def appending(device: torch.device, tiny: bool) -> Rows:
    for name in RECIPES[:2] if tiny else RECIPES:
        for batch, heads in ((1, (2, 1)),) if tiny else ((1, HEADS[0]), (16, HEADS[0])):
            tokens, appended = (128, 2) if tiny else (8192, 128)
            yield f"{name}, batch {batch}", functools.partial(gpu_parts.encoding, name, tokens, batch, heads, device, appended)


def prompts(device: torch.device, tiny: bool) -> Rows:
    heads = (2, 1) if tiny else HEADS[0]
    for name in RECIPES[:1] if tiny else RECIPES:
        before, new = (128, 128) if tiny else (32_768, gpu_parts.PREFILL)
        yield f"{name}, a chunk", functools.partial(gpu_parts.prompts, name, before, heads, device)
        yield f"{name}, whole", functools.partial(gpu_parts.whole_prompts, name, new, heads, device)


def begin(tiny: bool) -> torch.device:
    """The device, in a state that is the same in every process."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")


def measure(path: Path, names: list[str], tiny: bool, until: float) -> None:
    """Run parts in this process."""
    device, report = begin(tiny), Report(path)
    copied = report.found["facts"]["copy_gigabytes_per_second"]
    parts: dict[str, Callable[[float], Rows]] = {
        "correctness": lambda until: side_by_side(checked, RECIPES[:2] if tiny else EVERY, tiny, until),
        "steps": lambda until: side_by_side(stepped, gpu_model.STEPPED[: 1 if tiny else None], tiny, until),
        "decoding": lambda _: decoding(device, tiny, copied),
        "appending": lambda _: appending(device, tiny),
        "prompts": lambda _: prompts(device, tiny),
        "models": lambda _: gpu_model.rows(device, tiny),
    }
    for i, name in enumerate(names):
        now = time.time()
        share = (until - now) * SHARES[name] / sum(SHARES[other] for other in names[i:])
        with contextlib.closing(parts[name](now + share)) as rows:
            report.run(name, rows, now + share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    until = time.time() + 60 * arguments.minutes
    device = begin(arguments.tiny)
    if device.type != "cuda" and not arguments.tiny:
        parser.error("there is no GPU here; --tiny runs everything on small inputs by the interpreter")
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = facts(device) | {"copy_gigabytes_per_second": bandwidth(device)}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory is for the processes that measure
    name = "".join(c if c.isalnum() else "-" for c in known["card"]).strip("-").lower()
    path = arguments.out / f"gpu-{'tiny-' if arguments.tiny else ''}{name}.json"
    path.write_text(json.dumps({"facts": known, "left_out": []}), encoding="utf-8")
    left: list[str] = list(arguments.parts)
    while left:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(path, left, arguments.tiny, until))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        report = Report(path)
        under_way = max((i for i, part in enumerate(left) if part in report.found), default=len(left) - 1)
        report.leave_out(f"{left[under_way]}, the rest: its process ended with status {process.exitcode}")
        left = left[under_way + 1 :]
    print("left out:", json.loads(path.read_text(encoding="utf-8"))["left_out"] or "nothing")


if __name__ == "__main__":
    main()
