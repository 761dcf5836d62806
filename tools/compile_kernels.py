"""What the compiler makes of the kernels for a GPU, without one: `python tools/compile_kernels.py [--recipes ...] [--json
FILE]`.

For each architecture, and each recipe, the kernel over blocks for one query of four heads that share a KV head of 128
channels, as models in 16 bits use it: registers of a thread, instructions that spill them to memory, shared memory of a
program, instructions of the loop over blocks, and matrix instructions among them; then the other kernels. Not counted are
further rounds of outliers, which only a crowded block needs, and rotating queries anew, which one block of 32 does. Needs
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
from narrowkv.attention.cuda.block_table import layouts_of
from narrowkv.attention.cuda.kernels.attend_dense import attend_dense, merge
from narrowkv.attention.cuda.kernels.attend_packed import attend_blocks
from narrowkv.attention.cuda.kernels.attend_streams import Masks, QueryTables, Results, attend_streams
from narrowkv.attention.cuda.kernels.dequantize import dequantize_keys, dequantize_values, put_block_outliers, rotate_keys
from narrowkv.attention.cuda.kernels.dequantize_streams import (
    PairTables,
    TailOutliers,
    dequantize_stream_keys,
    dequantize_stream_tail,
    dequantize_stream_values,
)
from narrowkv.attention.cuda.kernels.dequantize_tail import dequantize_tail
from narrowkv.attention.cuda.kernels.layout import DenseSegments, KernelConfig, StreamLayout
from narrowkv.attention.cuda.kernels.merge_states import merge_split
from narrowkv.attention.cuda.kernels.streams import Blocks, StreamCodes
from narrowkv.attention.cuda.launch import WARPS, stages_of
from narrowkv.codec.cuda.kernels.encode import encode_tokens, put_tokens
from narrowkv.codec.cuda.kernels.encode_groups import encode_channel_groups, encode_token_groups
from narrowkv.codec.cuda.kernels.pack import pack_codes
from narrowkv.codec.cuda.kernels.trellis import search_streams

ARCHITECTURES = (80, 90, 100)
RECIPES = ("narrow4", "narrow3", "narrow2", "nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq4", "nuq3", "nuq2", "kivi-4", "kivi-2")
TYPES = {
    "query": "*bf16", "table": "*i64", "starts": "*i32", "bases": "*i32", "lengths": "*i32", "sums": "*fp32",
    "running_max": "*fp32", "tiles": "*fp16",
    "key_table": "*fp32", "key_bytes": "*i32", "key_scale": "*fp32", "key_zero": "*fp32",
    "value_table": "*fp32", "value_bytes": "*i32", "value_scale": "*fp32", "value_zero": "*fp32",
    "near": "*fp32", "cycles": "*fp64", "rope_state": "*i32", "padding": "*u8", "hidden": "*u8", "sink_index": "*i64",
    "scaling": "fp32", "softcap": "fp32", "rope_scale": "fp32",
}  # fmt: skip
STREAM_TYPES: dict[str, Any] = {
    "p_query": "*bf16", "p_lengths": "*i32", "results": Results("*fp32", "*fp32"), "p_tiles": "*fp16",
    "blocks": Blocks("*i64", "*i32", "*i32"), "keys": StreamCodes("*i32", "*fp32", "*fp32"),
    "values": StreamCodes("*i32", "*fp32", "*fp32"), "queries": QueryTables("*i32", "*fp32", "*fp32", "*fp64"),
    "masks": Masks("*i32", "*u8", "*u8", "*i64"), "scaling": "fp32", "softcap": "fp32",
    "rope_scale": "fp32", "p_rope_state": "*i32",
    "pairs": PairTables("*i32", "*fp32", "*fp32", "*fp64"), "p_keys": "*bf16", "p_values": "*bf16",
    "p_key_codes": "*u8", "p_value_codes": "*u8", "key_outliers": TailOutliers("*i64", "*bf16", "*i32"),
    "value_outliers": TailOutliers("*i64", "*bf16", "*i32"),
}  # fmt: skip
STRIDES = ("x_batch", "x_head", "x_token", "capacity", "block_stride", "head_stride", "row_stride", "code_stride")
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


def case_of(recipe: str) -> tuple[Any, Any, KernelConfig]:
    """Forms of keys and values, and the case."""
    schemes = get_recipe(recipe)
    quantizers = random_quantizer(schemes.keys), random_quantizer(schemes.values)
    keys, values = layouts_of(quantizers, KV_HEADS, HEAD_DIM, ("bf16", "bf16"))
    pairs = HEAD_DIM // 2 if schemes.keys.transform.pre_rope else 0
    case = KernelConfig(
        rows=4,
        capacity=8,
        queries=1,
        dim=HEAD_DIM,
        pairs=pairs,
        interleaved=False,
        rope_mode="near" if pairs else "none",
        sinks=schemes.sinks,
        softcap=False,
        padding=False,
        window=0,
        hidden=False,
        precision="tf32",
    )
    return keys, values, case


def compiled(recipe: str, architecture: int, exact: bool = False) -> Compiled:
    """Compile the kernel over blocks for one recipe and look at the result. exact: for queries in float32."""
    keys, values, case = case_of(recipe)
    constants = {"K": keys, "V": values, "C": case, "ELEMENT": tl.float32 if exact else tl.float16}
    streams = isinstance(keys, StreamLayout)
    kernel, types = (attend_streams, STREAM_TYPES) if streams else (attend_blocks, TYPES)
    if exact:
        types = types | dict.fromkeys(("p_query", "p_tiles", "query", "tiles"), "*fp32")
    return looked_at(f"{recipe}, float32" if exact else recipe, kernel, constants, types, architecture)


def of_streams(recipe: str, architecture: int) -> Iterator[Compiled]:
    """The kernels that dequantize streams, for prompts and of the tail."""
    keys, values, case = case_of(recipe)
    constants = {"K": keys, "V": values, "C": case, "ELEMENT": tl.float16}
    yield looked_at(f"dequantize keys, {recipe}", dequantize_stream_keys, constants, STREAM_TYPES, architecture)
    yield looked_at(f"dequantize values, {recipe}", dequantize_stream_values, constants, STREAM_TYPES, architecture)
    types = STREAM_TYPES | {"p_keys": "*fp32", "p_values": "*fp32"}
    yield looked_at("tail of streams", dequantize_stream_tail, constants, types, architecture)


def of_prompts(recipe: str, architecture: int) -> Iterator[Compiled]:
    """The kernels that decode blocks for prompts."""
    keys, values, case = case_of(recipe)
    types = TYPES | {"keys": "*bf16", "values": "*bf16", "elements": "*bf16", "scale": "*fp32", "zero": "*fp32"}
    types |= {"table": "*i64", "levels": "*fp32", "level_bytes": "*i32"}
    plain = {"K": replace(keys, nonzeros=0), "ELEMENT": tl.float16}
    apart = replace(case, rope_mode="none") if keys.nonzeros else case
    yield looked_at(f"decode keys, {recipe}", dequantize_keys, plain | {"C": apart}, types, architecture)
    yield looked_at(
        f"decode values, {recipe}", dequantize_values, plain | {"V": replace(values, nonzeros=0)}, types, architecture
    )
    if keys.nonzeros:
        yield looked_at("put outliers", put_block_outliers, {"side": 0, "F": keys}, types, architecture)
        yield looked_at("rotate keys", rotate_keys, {"HEADS": KV_HEADS, "C": case}, types, architecture)


def others(architecture: int) -> Iterator[Compiled]:
    """The other kernels, and that over blocks in float32."""
    for recipe in ("nuq4", "nuq4-1%", "kivi-2", "narrow3"):
        yield compiled(recipe, architecture, exact=True)
    for recipe in ("nuq4-1%", "kivi-2"):
        yield from of_prompts(recipe, architecture)
    yield from of_streams("narrow3", architecture)
    pointers = {"mean": "*fp32", "lse": "*fp32", "more": "*bf16", "more_lse": "*fp32"}
    yield looked_at("merge splits", merge_split, {"WIDE": HEAD_DIM}, pointers, architecture)
    keys, values, case = case_of("nuq3-1%")
    loose = replace(case, rope_mode="positions")
    exact = {f"{kind}_{side}": "*bf16" for kind in ("sink", "window", "new") for side in ("keys", "values")}
    types = TYPES | exact | {"packed_query": "*bf16", "tail_keys": "*fp32", "tail_values": "*fp32"}
    parts = {"TAIL": loose, "OLD": loose, "NEW": case, "L": DenseSegments(0, 1, 2, 3), "ELEMENT": tl.bfloat16}
    yield looked_at("loose", attend_dense, parts, types, architecture)
    types |= {"sink_logits": "*fp32", "output": "*fp32"}
    yield looked_at(
        "merge", merge, {"SLOTS": 128, "WIDE": 128, "SINKS": 32, "APART": True, "SHARE": True}, types, architecture
    )
    of_side = {"codes": "*u8", "scale": "*fp32", "zero": "*fp32", "index": "*i64", "outliers": "*bf16", "count": "*i32"}
    types |= {f"{side}_{part}": kind for side in ("key", "value") for part, kind in of_side.items()}
    types |= {"keys": "*fp32", "values": "*fp32"}
    yield looked_at("tail", dequantize_tail, {"K": keys, "V": values}, types, architecture)
    types |= {"codes": "*u8", "scale": "*fp16", "zero": "*fp16", "index": "*i64", "values": "*bf16", "elements": "*fp32"}
    tables = dict.fromkeys(("boundaries", "fixed_scale", "fixed_zero", "lower", "upper"), "*fp32")
    types |= tables | {"x": "*bf16", "skip": "*u8", "counts": "*i32", "offsets": "*i32"}
    shape = {"DIM": 128, "OUTLIERS": True, "SKIPS": True, "HAS_OFFSETS": True, "BOUNDARIES": 15}
    for name, heads, fixed, tail in (("keys", 8, True, 0), ("values", 8, False, 5), ("values of 32 heads", 32, False, 20)):
        choice = {"HEADS": heads, "HEADS_PER_PROGRAM": heads, "WIDE": 128 * heads, "FIXED": fixed, "TAIL": tail}
        yield looked_at(f"encode {name}", encode_tokens, shape | choice, types, architecture)
    shape = {"HEADS": 8, "DIM": 128, "GROUP": 32, "SKIPS": False, "BOUNDARIES": 3}
    yield looked_at("encode groups of tokens", encode_token_groups, shape | {"WIDE": 128}, types, architecture)
    del shape["SKIPS"]
    grouped = shape | {"GROUPS": 32, "WIDE": 32}
    yield looked_at("encode groups of channels", encode_channel_groups, grouped, types, architecture)
    types |= dict.fromkeys(("low", "high"), "*u8")
    for name, length, along in (("pack keys", 64, "row_stride"), ("pack values", 128, "code_stride")):
        planes = {"LENGTH": length, "WIDE": length, "ROWS": 32, "LOW": 2, "HIGH": 1, along: 1}
        yield looked_at(name, pack_codes, planes, types, architecture)
    types |= {"buffer": "*bf16"}
    constants = {"COUNTS": (1, 3, 4, 6, 1, 0), "N": 120, "BYTES": 48, "BY_ROW": False}
    types |= {"p_elements": "*i16", "p_weights": "*u16", "p_entries": "*i32", "p_codes": "*u8", "p_history": "*u8"}
    yield looked_at("search streams", search_streams, constants, types, architecture)
    yield looked_at("put tokens", put_tokens, {"HEADS": 8, "DIM": 128, "WIDE": 128, "HAS_OFFSETS": True}, types, architecture)


def looked_at(name: str, kernel: Any, constants: dict[str, Any], types: dict[str, Any], architecture: int) -> Compiled:
    """Compile a kernel and read what the compiler and the disassembler tell."""
    names = kernel.arg_names
    constants = {name: constant for name, constant in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {place: [["tt.divisibility", 16]] for place, name, kind in _arguments(signature) if _is_whole(name, kind)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    twice = kernel in (attend_dense, merge, rotate_keys) or constants.get("WIDE", 0) > 2048
    twice = twice or constants.get("ELEMENT") == tl.float32
    options = {"num_warps": 2 * WARPS if twice else WARPS}
    if kernel is search_streams:
        options["num_warps"] = 1
    if kernel in (attend_dense, attend_streams):
        options["num_stages"] = 1
    if kernel is attend_blocks:
        options["num_stages"] = stages_of(constants["K"], constants["V"], constants["ELEMENT"] == tl.float16)
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


def _arguments(signature: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Where each argument is, its name and type; those of tuples one by one."""
    for i, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            yield from (((i, j), f"{name}.{j}", part) for j, part in enumerate(kind))
        else:
            yield (i,), name, kind


def _is_whole(name: str, kind: str) -> bool:
    """Whether an argument is known to be a multiple of 16."""
    return kind.startswith("*") or (kind == "i32" and name in STRIDES)


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
