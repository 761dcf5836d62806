"""Write the tables and plots of README.md and docs from the files of results in results/: `make results`.

Every figure there was measured by the command in its file, which also has versions, hardware and date.
"""

from statistics import geometric_mean
from typing import Any

from benchmarks.real_models import at_equal_bits

import demo_tables
import speed_tables
import task_tables
from narrowkv.evaluate.results import read_result
from narrowkv.files import write_json
from narrowkv.report.plan import length
from narrowkv.report.plan import sections as plan_sections
from narrowkv.report.plots import COLORS, MARKERS, log_axis, new_figure, save
from pages import ROOT, markdown, replace_block, source

RESULTS, DOCS = ROOT / "results", ROOT / "docs"
MEASURED = ROOT / "src" / "narrowkv" / "methods" / "measured.json"
FAMILIES = {  # recipes, and where their labels stand in points
    "ours": ("narrow4", "narrow3", "narrow2", (8, 4)),
    "KVQuant, 1% outliers": ("nuq4-1%", "nuq3-1%", "nuq2-1%", (8, 4)),
    "KVQuant, no outliers": ("nuq4", "nuq3", "nuq2", (-28, -14)),
    "integer per token": ("int4", "int3", "int2", (8, 4)),
}
REAL = {"Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b", "Gemma-3-270M": "gemma-3-270m"}
REAL_FAMILIES = {
    "ours": ("narrow4", "narrow3", "narrow2", (8, 4)),
    "KVQuant, 1% outliers": ("nuq4-1%", "nuq3-1%", "nuq2-1%", (8, 4)),
    "KIVI": ("kivi-4", "kivi-2", (8, -12)),
    "one range for a token": ("nvfp4", "hadamard-int4", "int4", (8, 4)),
}
HALF_A_BIT_LESS = {"nuq4-1%": "narrow4", "nuq3-1%": "narrow3", "nuq2-1%": "narrow2"}
TEXTS, WINDOWS = ("encyclopedia", "code"), (512, 2048)
PLANNED = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")


def draw_families(axes: Any, families: dict[str, Any], rows: dict[str, dict[str, Any]], title: str) -> None:
    """KL divergence over allocated bits, a line for each kind of recipe."""
    for (label, (*names, offset)), color, marker in zip(families.items(), COLORS, MARKERS, strict=False):
        bits = [rows[name]["bits_per_element"] for name in names]
        divergence = [rows[name]["kld_strict"] for name in names]
        axes.plot(bits, divergence, marker=marker, color=color, label=label, markersize=8)
        for name, x, y in zip(names, bits, divergence, strict=True):
            axes.annotate(name, (x, y), textcoords="offset points", xytext=offset, fontsize=9, color=color)
    log_axis(axes.yaxis)
    axes.set_xlabel("allocated bits per element, everything counted")
    axes.set_ylabel("KL divergence from 16 bit (nats, strict)")
    axes.set_title(title)
    axes.margins(x=0.12)
    axes.legend(frameon=False)


def real(name: str) -> dict[str, Any]:
    """What `benchmarks.real_models` has found of one model."""
    return read_result(RESULTS / "real" / f"{name}.json", "real-models")


def rows_of(result: dict[str, Any], tables: str, text: str, window: int = 512) -> dict[str, dict[str, Any]]:
    """Its rows by recipe, for tables and a text of some kind and windows of some length."""
    wanted = {"tables": tables, "text": text, "window": window}
    return {row["recipe"]: row for row in result["rows"] if wanted.items() <= row.items()}


def write_real() -> None:
    """docs/real.svg: tables of the built-in mix, encyclopedia text scored."""
    figure, panels = new_figure(7 * len(REAL), 4, columns=len(REAL))
    for axes, (title, name) in zip(panels, REAL.items(), strict=True):
        draw_families(axes, REAL_FAMILIES, rows_of(real(name), "mix", TEXTS[0]), f"{title}: lower is better")
    save(figure, DOCS / "real.svg")


def write_summary() -> None:
    """README's first table: the cache of one shape at 128K tokens, and the perplexity of real models, by recipe."""
    plans = {row["recipe"]: row for row in read_result(RESULTS / PLANNED[0] / "plan.json", "plan")["rows"]}
    scored = [rows_of(real(name), "mix", TEXTS[0]) for name in REAL.values()]
    cells = []
    for recipe in ("fp16", *FAMILIES["ours"][:3]):
        (at,) = (at for at in plans[recipe]["contexts"] if at["tokens"] == 2**17)
        key = "perplexity_fp" if recipe == "fp16" else "perplexity_strict"
        perplexity = [f"{rows.get(recipe, next(iter(rows.values())))[key]:.2f}" for rows in scored]
        cells.append([f"`{recipe}`", f"{at['prompt'] / 2**30:.1f} GiB", *perplexity])
    heads = ["recipe", "cache of LLaMA-7B at 128K tokens", *(f"perplexity of {model}" for model in REAL)]
    caption = (
        "Bytes as `narrowkv plan` counts them. Perplexity is strict (see Accuracy), on WikiText-2 in windows of 512 tokens."
    )
    replace_block(ROOT / "README.md", "summary", f"{markdown(heads, cells)}\n{caption}\n")


def write_accuracy() -> None:
    """The tables of real models in docs/accuracy.md: ours against KVQuant, tables of one kind of text, and every recipe."""
    found = {model: real(name) for model, name in REAL.items()}
    parts = [*_against_tables(found), *_off_domain_table(found)]
    for model, result in found.items():
        mixed = {(text, window): rows_of(result, "mix", text, window) for window in WINDOWS for text in TEXTS}
        cells = [
            [
                f"`{recipe}`",
                f"{row['bits_per_element']:.2f}",
                *(f"{rows[recipe]['kld_strict']:.4f}" if recipe in rows else "-" for rows in mixed.values()),
                *(f"{mixed[text, WINDOWS[0]][recipe]['perplexity_strict']:.2f}" for text in TEXTS),
            ]
            for recipe, row in mixed[TEXTS[0], WINDOWS[0]].items()
        ]
        exact = [f"{next(iter(mixed[text, WINDOWS[0]].values()))['perplexity_fp']:.2f}" for text in TEXTS]
        heads = ["recipe", "bits", *(f"{text}, {window:,}" for text, window in mixed), "perplexity", "on code"]
        about = f"{model}: divergence with tables of the mix, by text and tokens of a window; perplexity in 16 bits {exact[0]}"
        parts.append(f"{about}, on code {exact[1]}.\n\n{markdown(heads, cells)}")
    origin = " ".join(source(result) for result in found.values()) + "\n"
    replace_block(DOCS / "accuracy.md", "real", "\n".join([*parts, origin]))


def _against_tables(found: dict[str, dict[str, Any]]) -> list[str]:
    """Divergence of ours over KVQuant's, and the bits of both: by windows, of the models that were scored on such."""
    parts = []
    for window in WINDOWS:
        rows = {
            (model, text): some
            for model, result in found.items()
            for text in TEXTS
            if HALF_A_BIT_LESS.keys() <= (some := rows_of(result, "mix", text, window)).keys()
        }
        if rows:
            models = list(dict.fromkeys(model for model, _ in rows))
            heads = [*(", ".join(cell) for cell in rows), "geometric mean", *(f"bits, {model}" for model in models)]
            lines = [_against(rows, theirs, equal) for equal in (False, True) for theirs in HALF_A_BIT_LESS]
            parts.append(markdown([f"windows of {window:,} tokens", *heads], lines))
    return parts


def _against(rows: dict[tuple[str, str], dict[str, Any]], theirs: str, equal: bool) -> list[str]:
    """A line of that table."""
    ours = {cell: at_equal_bits(some[theirs]) if equal else HALF_A_BIT_LESS[theirs] for cell, some in rows.items()}
    ratios = [some[ours[cell]]["kld_strict"] / some[theirs]["kld_strict"] for cell, some in rows.items()]
    bits = [
        f"{some[ours[model, text]]['bits_per_element']:.2f} / {some[theirs]['bits_per_element']:.2f}"
        for (model, text), some in rows.items()
        if text == TEXTS[0]
    ]
    label = f"narrow at the bits of `{theirs}`" if equal else f"`{HALF_A_BIT_LESS[theirs]}` against `{theirs}`"
    return [label, *(f"{ratio:.2f}" for ratio in (*ratios, geometric_mean(ratios))), *bits]


def _off_domain_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Off domain ours over KVQuant's, and of ours tables of the mix and of the other kind of text over the text's own kind.

    Of the models that were measured with tables of one kind of text.
    """
    found = {
        model: result
        for model, result in found.items()
        if all(rows_of(result, tables, text) for tables in TEXTS for text in TEXTS)
    }
    if not found:
        return []
    lines = []
    for theirs in HALF_A_BIT_LESS:
        pairs = (
            (("ours", "other"), ("theirs", "other")),
            (("ours", "mix"), ("ours", "own")),
            (("ours", "other"), ("ours", "own")),
            (("theirs", "other"), ("theirs", "own")),
        )
        lines.append([f"at the bits of `{theirs}`", *(_mean_ratio(found, theirs, *pair) for pair in pairs)])
    heads = ["", "ours over theirs, both off domain", "ours: mix over own", "ours: other over own", "theirs: other over own"]
    return [f"Geometric means over both texts of {' and '.join(found)}:\n\n{markdown(heads, lines)}"]


def _mean_ratio(found: dict[str, dict[str, Any]], theirs: str, first: tuple[str, str], second: tuple[str, str]) -> str:
    """Divergence of one over another, the geometric mean over models and texts.

    theirs: the recipe whose bits ours takes. first, second: whose, and whether tables are those of the mix, of the text's own
    kind or of the other kind.
    """
    ratios = []
    for result in found.values():
        names = {"theirs": theirs, "ours": at_equal_bits(rows_of(result, "mix", TEXTS[0])[theirs])}
        for text, other in (TEXTS, TEXTS[::-1]):
            kinds = {"mix": "mix", "own": text, "other": other}
            a, b = (rows_of(result, kinds[kind], text)[names[whose]]["kld_strict"] for whose, kind in (first, second))
            ratios.append(a / b)
    return f"{geometric_mean(ratios):.2f}"


def write_measured() -> None:
    """What `narrowkv recipes list` tells of losses: bits and divergence by model, on both texts."""
    losses: dict[str, dict[str, list[float]]] = {}
    for model, name in REAL.items():
        scored, code = (rows_of(real(name), "mix", text) for text in TEXTS)
        for recipe, row in scored.items():
            figures = [row["bits_per_element"], row["kld_strict"], code[recipe]["kld_strict"]]
            losses.setdefault(recipe, {})[model] = [round(figure, 4) for figure in figures]
    write_json(MEASURED, {recipe: found for recipe, found in losses.items() if len(found) == len(REAL)})


def write_demo() -> None:
    """The table of docs/results.md and docs/demo.svg."""
    result = read_result(RESULTS / "demo" / "demo.json", "demo")
    rows = result["rows"]
    figure, (axes,) = new_figure(7, 4)
    title = "The built-in model on text it was not trained on: lower is better"
    draw_families(axes, FAMILIES, {row["recipe"]: row for row in rows}, title)
    save(figure, DOCS / "demo.svg")
    columns = ["recipe", "bits", "of 16 bit", "perplexity strict", "perplexity stream", "KLD strict", "recall"]
    cells = [
        [
            f"`{row['recipe']}`",
            f"{row['bits_per_element']:.2f}",
            f"{row['nbytes'] / row['nbytes_fp16']:.0%}",
            f"{row['perplexity_strict']:.2f}",
            f"{row['perplexity_stream']:.2f}",
            f"{row['kld_strict']:.4f}",
            f"{row['recall']:.0%}",
        ]
        for row in rows
    ]
    first = rows[0]
    caption = (
        f"The built-in model, {first['tokens']:,} tokens in windows of {first['window']}; unquantized perplexity "
        f"{first['perplexity_fp']:.2f}, recall {first['recall_fp']:.0%}. {source(result)}\n"
    )
    replace_block(DOCS / "results.md", "demo", f"{markdown(columns, cells)}\n{caption}")


def write_plan() -> None:
    """The grid of docs/planner.md and its plot."""
    results = [read_result(RESULTS / name / "plan.json", "plan") for name in PLANNED]
    contexts = [at["tokens"] for at in results[0]["rows"][0]["contexts"]]
    columns = ["recipe", *(f"{name.removeprefix('llama-').upper()} {length(n)}" for name in PLANNED for n in contexts)]
    cells = [
        [f"`{rows[0]['recipe']}`", *(f"{at['prompt'] / 2**30:,.1f}" for row in rows for at in row["contexts"])]
        for rows in zip(*(result["rows"] for result in results), strict=True)
    ]
    commands = f"`narrowkv plan` of each shape with the options of {source(results[0])}"
    replace_block(DOCS / "planner.md", "plan", f"{markdown(columns, cells)}\n{commands}\n")
    (section,) = plan_sections(read_result(RESULTS / "llama-7b-80GiB" / "plan.json", "plan"))
    save(section.plots[0].figure, DOCS / "planner.svg")


def write_training() -> None:
    """The table of docs/training.md: what adapters gain, and what they cost."""
    results = [read_result(path, "adapters") for path in sorted((RESULTS / "training").glob("*.json"))]
    runs = [(row, result["settings"], source(result)) for result in results for row in result["rows"]]
    runs.sort(key=lambda run: (run[0]["model"], run[0]["recipe"], tokens_trained(run[1])))
    columns = [
        "model",
        "recipe",
        "KLD",
        "with adapters",
        "perplexity",
        "with adapters",
        "in 16 bits",
        "rank",
        "tokens",
        "minutes",
    ]
    cells = []
    for row, settings, _ in runs:
        before, after = row["before"], row["after"]
        change = f"{after['kld']:.4f} ({after['kld'] / before['kld'] - 1:+.0%})"
        perplexities = [f"{x:.2f}" for x in (before["perplexity"], after["perplexity"], before["perplexity_fp"])]
        cost = [str(settings["rank"]), f"{tokens_trained(settings):,}", f"{row['seconds'] / 60:.0f}"]
        name = row["model"].removeprefix("narrowkv://")
        cells.append([name, f"`{row['recipe']}`", f"{before['kld']:.4f}", change, *perplexities, *cost])
    commands = "".join(f"- {command}\n" for _, _, command in runs)
    replace_block(DOCS / "training.md", "adapters", f"{markdown(columns, cells)}\nIn the same order:\n\n{commands}")


def tokens_trained(settings: dict[str, Any]) -> int:
    """How many tokens adapters were trained on, repeats counted."""
    return int(settings["steps"] * settings["batch"] * settings["window"])


def write_speed() -> None:
    """The timed tables of docs/results.md and docs/serve.md, and the plot of growth."""
    for block, text in {
        "attention": speed_tables.attention("attention") + "\n" + speed_tables.bandwidth("attention"),
        "avx2": speed_tables.attention("attention-avx2"),
        "batches": speed_tables.attention("attention-batches"),
        "decode": speed_tables.decode(),
        "prefill": speed_tables.prefill(),
        "encode": speed_tables.encode(),
        "calibrate": speed_tables.calibrate(),
    }.items():
        replace_block(DOCS / "results.md", block, text)
    replace_block(DOCS / "serve.md", "serve", speed_tables.serve())
    speed_tables.growth(DOCS / "growth.svg")


def write_builtin() -> None:
    """Pages of the built-in model, from the commands of the CLI."""
    demo_tables.write_all(DOCS)


def write_tasks() -> None:
    """Tasks of real models, in docs/tasks.md."""
    found = [(model, task_tables.tasks(name)) for model, name in REAL.items() if (task_tables.TASKS / f"{name}.json").exists()]
    replace_block(DOCS / "tasks.md", "real-tasks", "\n".join(f"{model}:\n\n{table}" for model, table in found))


if __name__ == "__main__":
    write_real()
    write_summary()
    write_accuracy()
    write_measured()
    write_demo()
    write_plan()
    write_training()
    write_speed()
    write_builtin()
    write_tasks()
