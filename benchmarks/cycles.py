"""Inner loops over variants of the trellis-coded form: `python -m benchmarks.cycles [--json FILE]`.

Compiles `benchmarks/cycles/*.cpp` with the machine's C++ compiler (`CXX`, by default g++), once for each instruction set that
the processor has, and runs them one after the other on one core. Every loop is checked against plain loops before it is timed;
a wrong one ends the program. Times are the best of many, in nanoseconds for one token and KV head of 128 channels.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from narrowkv import _kernels

SOURCES = sorted((Path(__file__).parent / "cycles").glob("*.cpp"))
FLAGS = ["-std=c++17", "-O3", "-Wno-ignored-attributes", "-mfma", "-mf16c"]
INSTRUCTIONS = {"avx2": ["-mavx2"], "avx512": [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vbmi", "vbmi2", "vnni")]}

Row = dict[str, Any]


def processor() -> str:
    """The processor in the words of the system."""
    path = Path("/proc/cpuinfo")
    facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line) if path.exists() else {}
    named = {name.strip(): value.strip() for name, value in facts.items()}
    kind = [f"{name} {named[name]}" for name in ("cpu family", "model") if name in named]
    return ", ".join([named.get("model name", platform.processor() or platform.machine()), *kind])


def available() -> list[str]:
    """Instruction sets of which all parts are there."""
    needed = {"avx2": {"avx2"}, "avx512": {"avx512", "avx512vbmi", "avx512vbmi2", "avx512vnni"}}
    return [name for name in INSTRUCTIONS if needed[name] <= set(_kernels.instruction_sets())]


def measure(source: Path, instructions: str, folder: Path) -> list[Row]:
    """Compile a program for an instruction set, run it on one core, and read what it prints."""
    program = folder / f"{source.stem}-{instructions}"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *FLAGS, *INSTRUCTIONS[instructions], str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def table(rows: list[Row]) -> str:
    """Markdown: a line for each stage, variant and rates, a column for each instruction set and number of query heads."""
    columns = sorted({(row["instructions"], row["queries"]) for row in rows})
    lines: dict[tuple[str, str, str], dict[tuple[str, int], float]] = {}
    for row in rows:
        line = lines.setdefault((row["stage"], row["rates"], row["variant"]), {})
        line[row["instructions"], row["queries"]] = row["nanoseconds"]
    heads = [f"{name}, {queries}" for name, queries in columns]
    text = [f"| stage | rates | variant | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for (stage, rates, variant), times in sorted(lines.items()):
        cells = [f"{times[column]:.1f}" if column in times else "" for column in columns]
        text.append(f"| {stage} | {rates} | {variant} | {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--instructions", nargs="+", choices=INSTRUCTIONS, default=available())
    parser.add_argument("--programs", nargs="+", choices=[source.stem for source in SOURCES])
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            for instructions in arguments.instructions:
                if arguments.programs is None or source.stem in arguments.programs:
                    rows += measure(source, instructions, Path(folder))
    print(f"{processor()}; nanoseconds for one token and KV head of 128 channels, by instruction set and query heads\n")
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"processor": processor(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
