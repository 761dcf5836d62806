"""The tables and the plot of `plan`: bytes in each device over the context, and what fits."""

from typing import Any

from narrowkv.report.plots import new_figure, style_of
from narrowkv.report.sections import Cell, Plot, Section, Table

GIB = 2**30
Unit = tuple[int, str]


def sections(result: dict[str, Any]) -> list[Section]:
    """From what `read_result` returns of a file that `plan` wrote."""
    rows, settings = result["rows"], result["settings"]
    if not rows:
        return []
    least = min(at["decoding"] for row in rows for at in row["contexts"])
    unit = (GIB, "GiB") if least >= GIB / 10 else (2**20, "MiB")
    tables = [_contexts(rows, settings, unit)]
    if settings["memory"] is not None:
        tables.insert(0, _longest(rows, settings))
    return [Section(f"What fits: {settings['model']}", _text(rows, settings), tables, [_plot(rows, settings, unit)])]


def length(tokens: int) -> str:
    """Tokens as lengths are notes: 128K, 1M; others in full."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens % unit == 0 and tokens >= unit:
            return f"{tokens // unit:,}{name}"
    return f"{tokens:,}"


def _text(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    devices, layers = settings["devices"], settings["layers"]
    notes = [
        f"{kind['count']} of {kind['kv_heads']} KV heads x {kind['head_dim']}"
        + (f" in a sliding window of {kind['sliding_window']:,}" if kind["sliding_window"] else "")
        for kind in layers
    ]
    parts = [
        f"Layers: {', '.join(notes)}"
        + (
            f"; {settings['other_layers']} more keep a state of their own, which is not counted."
            if settings["other_layers"]
            else "."
        ),
        f"Weights: {rows[0]['weights'] / GIB:.2f} GiB in each GPU.",
        f"Batch {settings['batch']}; GiB are 2^30 bytes, 1K and 1M are 2^10 and 2^20 tokens.",
    ]
    if devices > 1:
        heads = min(kind["kv_heads"] for kind in layers)
        copies = devices // min(devices, heads)
        split = (
            f"each stores {heads // devices} of {heads}"
            if copies == 1
            else f"there are {heads}, so each is stored {copies} times (engines that copy heads do that; transformers refuses)"
        )
        parts.append(
            f"{devices} GPUs share the KV heads: {split}; positions, and weights that are not split, are in every GPU."
        )
    parts.append(
        "prompt: allocated once a prompt of that length was read. decoding: allocated from the first block of new tokens on, "
        "with space for a sixteenth more. The larger must fit. Activations come on top (--reserve)."
    )
    return " ".join(parts)


def _longest(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Table:
    base = next((row["longest"] for row in rows if row["recipe"] == "fp16"), None)
    table: list[list[Cell]] = []
    for row in rows:
        times = row["longest"] / base if base and row["longest"] is not None else None
        table.append([row["recipe"], row["longest"] if row["limited"] else "no limit", times])
    reserve = f", of which {settings['reserve'] / GIB:.1f} GiB stored" if settings["reserve"] else ""
    caption = f"Longest context for each sequence in {settings['memory'] / GIB:.1f} GiB a GPU{reserve}"
    return Table(caption, ["recipe", "tokens", "times fp16"], table, {"times fp16": 1})


def _contexts(rows: list[dict[str, Any]], settings: dict[str, Any], unit: Unit) -> Table:
    size, name = unit
    limited = settings["memory"] is not None
    columns = [
        "recipe",
        "context",
        f"prompt {name}",
        f"decoding {name}",
        f"with weights {name}",
        *(["fits"] if limited else []),
    ]
    table: list[list[Cell]] = []
    for row in rows:
        for at in row["contexts"]:
            cells: list[Cell] = [row["recipe"], length(at["tokens"])]
            cells += [at["prompt"] / size, at["decoding"] / size, (max(at["prompt"], at["decoding"]) + row["weights"]) / size]
            table.append([*cells, *([at["fits"]] if limited else [])])
    return Table("Cache in each GPU", columns, table)


def _plot(rows: list[dict[str, Any]], settings: dict[str, Any], unit: Unit) -> Plot:
    """Where the lines cross the limit; the largest recipe first in the legend, as it is in the plot."""
    size, name = unit
    figure, (axes,) = new_figure(7.5, 4.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    weights, highest = rows[0]["weights"] / size, 0.0
    for i, row in sorted(enumerate(rows), key=lambda pair: -pair[1]["contexts"][-1]["decoding"]):
        style: Any = style_of(i)
        tokens = [at["tokens"] for at in row["curve"]]
        taken = [weights + max(at["prompt"], at["decoding"]) / size for at in row["curve"]]
        axes.plot(tokens, taken, label=row["recipe"], markersize=4, **style)
        highest = max(highest, *taken)
    coordinates = ("axes fraction", "data")
    axes.axhline(weights, color="#000000", linestyle=":", linewidth=1.2)
    axes.annotate("weights alone", (0.99, weights), (0, -3), coordinates, "offset points", ha="right", va="top", fontsize=9)
    caption = "Lower is better."
    if settings["memory"] is not None:
        limit = (settings["memory"] - settings["reserve"]) / size
        highest = min(highest, 2 * limit)
        axes.axhline(limit, color="#000000", linestyle="--", linewidth=1.2)
        axes.annotate("what each GPU has", (0.01, limit), (0, 2), coordinates, "offset points", va="bottom", fontsize=9)
        caption = "Where a line crosses the dashed one, the recipe's longest context ends."
    axes.set_ylim(weights / (highest / weights) ** 0.08, 1.1 * highest)
    if all(row["limited"] for row in rows):
        axes.set_xlim(right=2 * max(row["longest"] for row in rows))
    axes.xaxis.set_major_formatter(lambda value, _: length(round(value)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("context, tokens of each sequence")
    axes.set_ylabel(f"weights and cache in each GPU, {name}")
    gpus = "1 GPU" if settings["devices"] == 1 else f"{settings['devices']} GPUs"
    axes.set_title(f"{settings['model']}, batch {settings['batch']}, {gpus}: memory over context")
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return Plot("memory", caption, figure)
