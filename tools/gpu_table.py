"""`docs/gpu.md` from results of `make gpu`: `python tools/gpu_table.py results/gpu-*.json > docs/gpu.md`."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def page(found: dict[str, Any]) -> str:
    """What one file of results says."""
    facts = found["facts"]
    parts = [
        f"## {facts['card']}",
        f"Measured on {facts['date']} with torch {facts['torch']}, Triton {facts['triton']}, CUDA {facts['cuda']}, narrowkv "
        f"{facts['narrowkv']}. A copy moves {facts['copy_gigabytes_per_second']:.0f} GB/s, bytes read and written.",
    ]
    for name, make in (
        ("correctness", correctness), ("steps", steps), ("decoding", decoding), ("appending", appending), ("prompts", prompts),
        ("models", models),
    ):  # fmt: skip
        if found.get(name):
            parts.append(make(found[name]))
    if found.get("tests"):
        parts.append(f"Tests of kernels that need no interpreter: {found['tests'][0]}.")
    if found.get("million"):
        parts.append(million(found["million"]))
    if found["left_out"]:
        parts.append("Left out: " + "; ".join(found["left_out"]) + ".")
    return "\n\n".join(parts)


def correctness(rows: list[Row]) -> str:
    kinds = [kind for kind in ("float32", "float16", "bfloat16") if kind in rows[0]]
    cells = (
        [row["recipe"], len(row["each"]), *(row[kind] for kind in kinds), "" if row["right"] else "**wrong**"] for row in rows
    )
    return "Largest relative error against the naive reference, by the dtype of the queries:\n\n" + table(
        ["recipe", "shapes", *kinds, ""], cells
    )


def steps(rows: list[Row]) -> str:
    cells = ([row["recipe"], row["steps"], row["launches"], row.get("graph")] for row in rows)
    head = ["recipe", "tokens", "launch by launch", "by a CUDA graph"]
    return "Relative distance of logits from plain torch's, token by token behind a prompt:\n\n" + table(head, cells)


def decoding(rows: list[Row]) -> str:
    head = ["recipe", "heads", "batch", "tokens", "ms", "best of torch and others, ms", "times as fast", "of the bandwidth"]
    cells = (
        [
            row["recipe"], "/".join(map(str, row["heads"])), row["batch"], row["tokens"], row["milliseconds"],
            min(row["peers"].values(), default=None), row["ratio"], f"{100 * row['share_of_bandwidth']:.0f}%",
        ]
        for row in rows
    )  # fmt: skip
    return "Attention of one token in one layer:\n\n" + table(head, cells)


def appending(rows: list[Row]) -> str:
    cells = ([row["recipe"], row["batch"], row.get("step"), row["append"], 1e3 * row["prompt_token"]] for row in rows)
    head = ["recipe", "batch", "one token, on the device, ms", "as the host calls it, ms", "a token of a prompt, us"]
    return "Storing in one layer:\n\n" + table(head, cells)


def prompts(rows: list[Row]) -> str:
    cells = (
        [row["recipe"], row["tokens"], row["new"], row["milliseconds"], row["sdpa"], row["milliseconds"] / row["sdpa"]]
        for row in rows
    )
    head = ["recipe", "tokens before", "tokens", "ms", "sdpa, ms", "times as long"]
    return "Attention of a chunk of a prompt in one layer, with appending where none is before it:\n\n" + table(head, cells)


def models(rows: list[Row]) -> str:
    head = ["model", "cache", "tokens", "batch", "ms a token", "cache, GB", "peak, GB", "longest context"]
    cells = (
        [
            row["model"], row["cache"] + (", CUDA graph" if row["graph"] else ""), row["tokens"], row["batch"],
            row["milliseconds"] or row["why"],
            *(None if row.get(name) is None else row[name] / 1e9 for name in ("cache_bytes", "peak_bytes")),
            row.get("longest"),
        ]
        for row in rows
    )  # fmt: skip
    return "Whole models with random weights:\n\n" + table(head, cells)


def million(found: Row) -> str:
    measured = found.get("measured") or {}
    cells = [
        [
            found["recipe"], measured.get("tokens"), measured.get("cache_bytes", 0) / 1e9,
            measured.get("attention_milliseconds"), measured.get("gigabytes_per_second"),
        ]
    ]  # fmt: skip
    head = ["recipe", "tokens", "cache of 32 layers, GB", "attention of a token, all layers, ms", "GB/s"]
    return "A million tokens on the card:\n\n" + table(head, cells)


def main() -> None:
    pages = [page(json.loads(Path(name).read_text(encoding="utf-8"))) for name in sys.argv[1:]]
    print("# On a GPU\n\nWritten by `tools/gpu_table.py` from the results of `make gpu`.\n\n" + "\n\n".join(pages))


if __name__ == "__main__":
    main()
