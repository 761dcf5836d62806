"""Tables of what was timed, for docs/results.md, one function each, from files in results/speed."""

from pathlib import Path
from typing import Any

from narrowkv.evaluate.results import read_result
from narrowkv.report.plots import COLORS, log_axis, new_figure, save
from pages import ROOT, markdown, source

SPEED = ROOT / "results" / "speed"
Result = dict[str, Any]


def timed(name: str, kind: str) -> Result:
    """A file of results/speed."""
    return read_result(SPEED / f"{name}.json", kind)


def attention(name: str) -> str:
    """Milliseconds of one token's attention by recipe, and in brackets how many times as fast as torch's best in bf16."""
    result = timed(name, "attention")
    parts = []
    for capability in dict.fromkeys(row["torch_uses"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["torch_uses"] == capability]
        cases = list(dict.fromkeys((row["tokens"], row["batch"], row["threads"]) for row in rows))
        at = {(row["recipe"], (row["tokens"], row["batch"], row["threads"])): row for row in rows}
        heads = [f"{tokens:,} tokens{f', batch {batch}' if batch > 1 else ''}, {_threads(n)}" for tokens, batch, n in cases]
        first = rows[0]["recipe"]
        lines = [["torch, bf16", *(f"{at[first, case]['milliseconds_bfloat16']:.2f} ms" for case in cases)]]
        for recipe in dict.fromkeys(row["recipe"] for row in rows):
            found = [at[recipe, case] for case in cases]
            cells = [f"{row['milliseconds']:.2f} ms ({row['ratio_bfloat16']:.1f})" for row in found]
            lines.append([f"`{recipe}`", *cells])
        parts.append(markdown([f"torch on {capability}", *heads], lines))
    return "\n".join([*parts, source(result) + "\n"])


def bandwidth(name: str) -> str:
    """Packed bytes read a second, as a share of the bandwidth of a sum, by recipe and case."""
    result = timed(name, "attention")
    longest = max(row["tokens"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["tokens"] == longest and row["threads"] == result["rows"][0]["threads"]]
    shares = ", ".join(f"`{row['recipe']}` {row['share_of_bandwidth']:.0%}" for row in rows)
    read = rows[0]["bandwidth_gigabytes_per_second"]
    return f"Of {read:.0f} GB/s, the bandwidth of a sum, packed bytes at {longest:,} tokens are read at: {shares}.\n"


def growth(path: Path) -> None:
    """A plot of milliseconds over tokens, a line for each recipe and for torch, a panel for each number of threads."""
    rows = timed("attention-growth", "attention")["rows"]
    panels = sorted({row["threads"] for row in rows})
    figure, grid = new_figure(4.5 * len(panels), 4, columns=len(panels))
    for axes, threads in zip(grid, panels, strict=True):
        inside = [row for row in rows if row["threads"] == threads]
        recipes = list(dict.fromkeys(row["recipe"] for row in inside))
        for recipe, color in zip(recipes, COLORS, strict=False):
            line = [row for row in inside if row["recipe"] == recipe]
            axes.plot([row["tokens"] for row in line], [row["milliseconds"] for row in line], "o-", color=color, label=recipe)
        times = [row["milliseconds_bfloat16"] for row in line]
        axes.plot([row["tokens"] for row in line], times, "k--", label="torch, bf16")
        axes.set_title(_threads(threads))
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel("attention of one token (ms)")
        log_axis(axes.xaxis)
        log_axis(axes.yaxis)
    grid[-1].legend(frameon=False, fontsize=8)
    save(figure, path)


def decode() -> str:
    """Milliseconds of one decoded token of a whole model, by cache."""
    result = timed("decode", "decode")
    cells = [
        [
            row["cache"] if " " in row["cache"] else f"`{row['cache']}`",
            f"{row['milliseconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['cache_milliseconds']:.1f}",
        ]
        for row in result["rows"]
    ]
    heads = ["cache", "ms per token", "speedup over DynamicCache", "time due to the cache, ms"]
    return f"{markdown(heads, cells)}\n{source(result)}\n"


def prefill() -> str:
    """Time of appending and attending a prompt, in multiples of torch's best."""
    result = timed("prefill", "prefill")
    cases = list(dict.fromkeys((row["past"], row["new"], row["dtype"]) for row in result["rows"]))
    at = {(row["recipe"], (row["past"], row["new"], row["dtype"])): row for row in result["rows"]}
    heads = [f"{new:,} tokens {f'after {past:,}' if past else 'at once'}, {dtype}" for past, new, dtype in cases]
    recipes = dict.fromkeys(row["recipe"] for row in result["rows"])
    cells = [
        [
            f"`{recipe}`",
            *(f"{at[recipe, case]['ratio']:.2f} ({at[recipe, case]['milliseconds'] / 1e3:.2f} s)" for case in cases),
        ]
        for recipe in recipes
    ]
    return f"{markdown(['recipe', *heads], cells)}\n{source(result)}\n"


def encode() -> str:
    """Microseconds of appending one token, and tokens of a prompt each second, against the references in plain torch."""
    result = timed("encode", "encode")
    cells = [
        [
            f"`{row['recipe']}`",
            str(row["threads"]),
            f"{row['microseconds_per_token']:.0f}",
            f"{row['ratio_decode']:.1f}",
            f"{row['share_of_attention']:.1%}",
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['ratio_prefill']:.1f}",
        ]
        for row in result["rows"]
    ]
    heads = ["recipe", "threads", "us per token", "times torch", "of attention", "prefill tokens/s", "times torch"]
    return f"{markdown(heads, cells)}\n{source(result)}\n"


def calibrate() -> str:
    """Seconds and memory of calibrating the built-in model, and of fitting one layer of the shape of a 7B model."""
    result = timed("calibrate", "calibrate")
    stages = ("ranges", "gradients", "codebooks")
    cells = [
        [
            row["of"],
            f"`{row['recipe']}`",
            f"{row['seconds']:.1f}",
            *(f"{row[f'seconds_{stage}']:.1f}" if f"seconds_{stage}" in row else "-" for stage in stages),
            f"{row['extra_bytes'] / 1e6:.0f} MB",
            f"{row['ratio']:.0f}" if "ratio" in row else "-",
        ]
        for row in result["rows"]
    ]
    heads = ["of", "recipe", "seconds", *stages, "peak memory besides the input", "times as fast as k-means on raw elements"]
    return f"{markdown(heads, cells)}\n{source(result)}\n"


def serve() -> str:
    """What batches and prefixes of the server gain."""
    result = timed("serve", "serve")
    cells = [[row["what"], f"{row['value']:.3g}"] for row in result["rows"]]
    return f"{markdown(['', result['settings']['source']], cells)}\n{source(result)}\n"


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"
