"""Write the tables of docs/limits.md, which says when not to use NarrowKV, from files of results: part of `make results`."""

from typing import Any

from narrowkv.evaluate.results import read_result
from narrowkv.report.plan import length
from pages import markdown, replace_block, source
from write_results import DOCS, REAL, RESULTS, real, rows_of

SHAPES = {"a 7B model": "llama-7b", "Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b", "Gemma-3-270M": "gemma-3-270m"}
CONTEXTS = (512, 1024, 2048, 8192, 32768)
SHORT = ("narrow4", "narrow3", "narrow2", "nuq3-1%", "int4", "kivi-2")
FAILING = ("narrow2", "nuq2-1%", "kivi-2", "int4")
RECALLING = ("fp16", "narrow2", "nuq2-1%", "nuq2", "int3", "int2")
KINDS = ("mix", "encyclopedia", "code")  # of texts from which tables were learned


def short_contexts() -> str:
    """Bits per element of each recipe by the length of the context, and the tables' share of them, for three models."""
    found = {label: read_result(RESULTS / "short" / name / "plan.json", "plan") for label, name in SHAPES.items()}
    parts = []
    for label, result in found.items():
        rows = {row["recipe"]: row for row in result["rows"]}
        exact = sizes(rows["fp16"])
        lines = [
            [f"`{recipe}`", *(f"{16 * sizes(rows[recipe])[tokens] / exact[tokens]:.2f}" for tokens in CONTEXTS)]
            for recipe in SHORT
        ]
        parts.append(markdown([f"bits, {label}", *(f"{length(tokens)} tokens" for tokens in CONTEXTS)], lines))
    commands = " ".join(source(result) for result in found.values())
    return "\n".join([*parts, f"{commands}\n"])


def sizes(row: dict[str, Any]) -> dict[int, int]:
    """Bytes after a prompt, by its tokens."""
    return {at["tokens"]: at["prompt"] for at in row["contexts"]}


def small_models() -> str:
    """Perplexity of two small models with recipes that are too coarse for them."""
    found = {label: rows_of(real(name), "mix", "encyclopedia") for label, name in REAL.items()}
    exact = [f"{next(iter(rows.values()))['perplexity_fp']:.2f}" for rows in found.values()]
    lines = [["unquantized", *exact]]
    lines += [[f"`{recipe}`", *(f"{rows[recipe]['perplexity_strict']:.2f}" for rows in found.values())] for recipe in FAILING]
    commands = " ".join(source(real(name)) for name in REAL.values())
    return f"{markdown(['recipe', *(f'perplexity, {label}' for label in found)], lines)}\n{commands}\n"


def exact_words() -> str:
    """Recall of exact words, alongside KL divergence, on the built-in model."""
    result = read_result(RESULTS / "demo" / "demo.json", "demo")
    rows = {row["recipe"]: row for row in result["rows"]}
    lines = [[f"`{recipe}`", f"{rows[recipe]['recall']:.0%}", f"{rows[recipe]['kld_strict']:.4f}"] for recipe in RECALLING]
    return f"{markdown(['recipe', 'recall', 'KLD'], lines)}\n{source(result)}\n"


def other_texts() -> str:
    """KL divergence by the text that tables were learned from and the text that was scored."""
    result = real(REAL["Qwen2.5-Coder-0.5B"])
    cells = {(tables, text): rows_of(result, tables, text) for tables in KINDS for text in KINDS[1:]}
    shared = [recipe for recipe in cells["mix", "code"] if all(recipe in rows for rows in cells.values())]
    heads = [f"tables of {tables}, scored on {text}" for tables, text in cells]
    lines = [[f"`{recipe}`", *(f"{rows[recipe]['kld_strict']:.4f}" for rows in cells.values())] for recipe in shared]
    return f"{markdown(['recipe', *heads], lines)}\n{source(result)}\n"


def write_limits() -> None:
    """All tables of docs/limits.md."""
    for name, make in {
        "short": short_contexts,
        "small": small_models,
        "words": exact_words,
        "texts": other_texts,
    }.items():
        replace_block(DOCS / "limits.md", name, make())


if __name__ == "__main__":
    write_limits()
