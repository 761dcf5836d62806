"""What the compiler makes of the kernels for a GPU, without one: `python tools/compile_kernels.py [--recipes ...] [--json
FILE]`.

For each architecture, and each recipe, the kernel over blocks for one query of four heads that share a KV head of 128
channels, as models in 16 bits use it: registers of a thread, instructions that spill them to memory, shared memory of a
program, instructions of the loop over blocks, and matrix instructions among them; then the other kernels. Not counted are
further rounds of outliers, which only a crowded block needs, and turning queries anew, which one block of 32 does. Needs
Triton, not interpreted.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from benchmarks.drawn import HEAD_DIM, KV_HEADS, random_quantizer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from narrowkv import get_recipe
from narrowkv.attention.cuda_blocks import forms_of
from narrowkv.attention.triton_blocks import attend_blocks
from narrowkv.attention.triton_forms import Case
from narrowkv.attention.triton_launch import WARPS, stages_of
from narrowkv.attention.triton_loose import attend_loose, merge
from narrowkv.attention.triton_tail import decode_tail, put_outliers
from narrowkv.codec.triton_encode import encode_tokens, nearest_points

ARCHITECTURES = (80, 90, 100)
RECIPES = (
    *("nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq4", "nuq3", "nuq2", "kivi-4", "kivi-2"),
    *("pair2", "pair2-1%", "pair2.5", "pair3", "pair3-1%", "pair3.5", "pair4"),
)
TYPES = {
    "query": "*bf16", "table": "*i64", "starts": "*i32", "bases": "*i32", "lengths": "*i32", "sums": "*fp32",
    "peaks": "*fp32", "tiles": "*fp16",
    "key_table": "*fp32", "key_bytes": "*i32", "key_scale": "*fp32", "key_zero": "*fp32",
    "value_table": "*fp32", "value_bytes": "*i32", "value_scale": "*fp32", "value_zero": "*fp32",
    "near": "*fp32", "turns": "*fp64", "kept": "*i32", "padding": "*u8", "hidden": "*u8", "sink_index": "*i64",
    "scaling": "fp32", "softcap": "fp32", "stretch": "fp32",
}  # fmt: skip
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel."""

    kernel: str  # over blocks: the recipe
    architecture: int
    registers: int
    spills: int  # instructions that read or write local memory
    shared: int
    instructions: int
    loop: int
    matrix: int


def case_of(recipe: str) -> tuple[Any, Any, Case]:
    """Forms of keys and values, and the case."""
    schemes = get_recipe(recipe)
    quantizers = random_quantizer(schemes.keys), random_quantizer(schemes.values)
    keys, values = forms_of(quantizers, KV_HEADS, HEAD_DIM, ("bf16", "bf16"))
    pairs = HEAD_DIM // 2 if schemes.keys.pre_rope else 0
    case = Case(
        rows=4,
        room=8,
        queries=1,
        dim=HEAD_DIM,
        pairs=pairs,
        interleaved=False,
        turning="near" if pairs else "none",
        sinks=schemes.sinks,
        softcap=False,
        padding=False,
        window=0,
        hidden=False,
        precision="tf32",
    )
    return keys, values, case


def compiled(recipe: str, architecture: int) -> Compiled:
    """Compile the kernel over blocks for one recipe and look at the result."""
    keys, values, case = case_of(recipe)
    return looked_at(recipe, attend_blocks, {"K": keys, "V": values, "C": case, "NUMBER": tl.float16}, TYPES, architecture)


def others(architecture: int) -> Iterator[Compiled]:
    """The kernels beside it."""
    keys, values, case = case_of("pair2-1%")
    loose = replace(case, turning="positions")
    exact = {"query": "*bf16", "keys": "*bf16", "values": "*bf16", "places": "*i64", "numbers": "*fp32", "codes": "*u8"}
    types = TYPES | exact | {"sink_logits": "*fp32", "output": "*fp32", "table": "*fp32", "scale": "*fp16", "zero": "*fp16"}
    yield looked_at("loose", attend_loose, {"PLACED": True, "C": loose, "NUMBER": tl.bfloat16}, types, architecture)
    yield looked_at("merge", merge, {"SLOTS": 128, "WIDE": 128, "SINKS": 32, "APART": True}, types, architecture)
    types |= {"index": "*i64", "values": "*bf16"}
    yield looked_at("tail", decode_tail, {"F": keys, "WIDE": 64}, types, architecture)
    yield looked_at("tail outliers", put_outliers, {"F": values}, types, architecture)
    tables = dict.fromkeys(("boundaries", "fixed_scale", "fixed_zero", "lower", "upper", "points", "cost"), "*fp32")
    types |= tables | {"x": "*bf16", "skip": "*u8", "counts": "*i32"}
    shape = {"HEADS": 8, "DIM": 128, "WIDE": 1024, "OUTLIERS": True, "SKIPS": True, "BOUNDARIES": 15}
    for name, fixed, tail in (("encode keys", True, 0), ("encode values", False, 5)):
        choice = {"SHARED": not fixed, "FIXED": fixed, "TAIL": tail}
        yield looked_at(name, encode_tokens, shape | choice, types, architecture)
    points = {"CODES": 64, "LEVELS": 16, "NUMBERS": 2, "WIDE": 64}
    yield looked_at("nearest points", nearest_points, points, types, architecture)


def looked_at(name: str, kernel: Any, constants: dict[str, Any], types: dict[str, str], architecture: int) -> Compiled:
    """Compile a kernel and read what the compiler and the disassembler tell."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 2 * WARPS if kernel in (attend_loose, merge) else WARPS}
    if "K" in constants:
        options["num_stages"] = stages_of(constants["K"], constants["V"])
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None
    operations, loop = _loop(code)
    spills = sum(operation in ("LDL", "STL") for operation in operations)
    matrix = sum(count for operation, count in Counter(loop).items() if "MMA" in operation)
    return Compiled(name, architecture, int(found[1]), spills, made.metadata.shared, len(operations), len(loop), matrix)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _loop(code: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of the longest loop that run for every block."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif step := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);", line):
            if step[1].startswith("BRA") and (target := re.search(r"\.L_x_\d+", step[2])):
                jumps.append((len(operations), target[0]))
            operations.append(step[1].split(".")[0])
    stretches = [tuple(sorted((at, labels.get(to, at)))) for at, to in jumps]
    loops = [(labels[to], at) for at, to in jumps if labels.get(to, at) < at]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    seldom: set[int] = set()
    for first, last in stretches:
        if begin <= first < last <= end and (first, last) != (begin, end):
            within = operations[first : last + 1]
            round_of_outliers = (first, last) in loops and "STG" in within
            turned_anew = (first, last) not in loops and "DMUL" in within
            if round_of_outliers or turned_anew:
                seldom.update(range(first, last))
    return operations, [operations[i] for i in range(begin, end + 1) if i not in seldom]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    print("| kernel | sm | registers | spills | shared bytes | loop, instructions | of them matrix |")
    print("|---|---|---|---|---|---|---|")
    for architecture in arguments.architectures:
        over_blocks = (compiled(recipe, architecture) for recipe in arguments.recipes)
        for row in (*over_blocks, *others(architecture)):
            rows.append(asdict(row))
            cells = (row.kernel, row.architecture, row.registers, row.spills, row.shared, row.loop, row.matrix)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
