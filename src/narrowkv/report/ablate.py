"""Tables and plots of `ablate`: one section for each ablation."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from narrowkv.report.plots import COLORS, log_axis, new_figure, style_of
from narrowkv.report.sections import Plot, Section, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
LOSS = "KL divergence, strict (nats)"
FIGURES = {  # entry of a row: heading, digits
    "bits_per_element": ("allocated bits", 2),
    "perplexity_strict": ("perplexity strict", 3),
    "perplexity_stream": ("stream", 3),
    "kld_strict": ("KLD strict", 4),
    "kld_strict_p99": ("KLD 99%", 3),
    "top1": ("top-1", 3),
}


def sections(result: dict[str, Any]) -> list[Section]:
    """From what `read_result` returns of a file that `ablate` wrote: a section for each ablation that has rows."""
    found = []
    for ablation, make in MAKERS.items():
        rows = [row for row in result["rows"] if row["ablation"] == ablation]
        if rows:
            found += make(rows, result)
    return found


def _steps(rows: list[Row], result: dict[str, Any]) -> list[Section]:
    figure, (axes,) = new_figure(8, 4.8)
    for i, (bits, line) in enumerate(_by(rows, "bits").items()):
        _line(axes, i, [row["step"] for row in line], line, f"{bits} bits")
    labels = {row["step"]: row["label"] for row in rows}
    axes.set_xticks(sorted(labels), [labels[step] for step in sorted(labels)], rotation=35, ha="right")
    axes.legend(frameon=False)
    text = f"{_setup(rows, result)} KVQuant's ablation: each step is added to those above it."
    return [_section("The method, step by step", text, rows, ["bits", "label"], "steps", "What each step gains.", figure)]


def _grid(rows: list[Row], result: dict[str, Any]) -> list[Section]:
    widths = _by(rows, "bits")
    figure, panels = new_figure(3.2 * len(widths) + 1.6, 4.2, columns=len(widths), sharey=True)
    ranges = list(dict.fromkeys(row["range"] for row in rows))
    for axes, (bits, group) in zip(panels, widths.items(), strict=True):
        for i, (side, line) in enumerate(_by(group, "side").items()):
            style: Any = style_of(i)
            positions = [ranges.index(row["range"]) for row in line]
            axes.plot([row["kld_strict"] for row in line], positions, linestyle="", label=side, **style)
        axes.set_yticks(range(len(ranges)), ranges)
        axes.set(xlabel=LOSS, title=f"{bits} bits")
        log_axis(axes.xaxis)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("which elements share a range")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    text = (
        f"{_setup(rows, result)} Integers for the keys alone or for the values alone: the other side is exact, and counts in "
        "the allocated bits. Ranges of a channel come from calibration, all others are taken online."
    )
    caption = "Left is better: keys want ranges by channel, before the rotary embedding most; values differ less."
    return [_section("Who shares a range", text, rows, ["bits", "side", "range"], "grid", caption, figure)]


def _outliers(rows: list[Row], result: dict[str, Any]) -> list[Section]:
    figure, (axes,) = new_figure(6, 4)
    for i, (bits, line) in enumerate(_by(rows, "bits").items()):
        _line(axes, i, [100 * row["fraction"] for row in line], line, f"{bits} bits")
    axes.set_xlabel("outliers left exact (% of the elements)")
    figure.legend(loc="outside right upper", frameon=False)
    caption = "How much each further outlier gains."
    text = (
        f"{_setup(rows, result)} KVQuant with a part of its elements exact. Values keep an integer number of outliers for "
        f"each "
        "token, so that on a model with few elements a token a small part may come to none, which the allocated bits show."
    )
    return [_section("Outliers", text, rows, ["bits", "label"], "outliers", caption, figure)]


def _sinks(rows: list[Row], result: dict[str, Any]) -> list[Section]:
    figure, (axes,) = new_figure(6, 4)
    for i, (bits, group) in enumerate(_by(rows, "bits").items()):
        for fraction, line in _by(group, "fraction").items():
            label, dashes = f"{bits} bits, {fraction:.0%} outliers", "-" if fraction else "--"
            _line(axes, i, [row["sinks"] for row in line], line, label, linestyle=dashes)
    axes.set_xticks(sorted({row["sinks"] for row in rows}))
    axes.set_xlabel("first tokens left exact")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    caption = "What exact first tokens gain, with and without outliers."
    return [_section("Attention sinks", _setup(rows, result), rows, ["bits", "fraction", "sinks"], "sinks", caption, figure)]


def _parts(rows: list[Row], result: dict[str, Any]) -> list[Section]:
    found = []
    whole = [row for row in rows if row["side"] != "layers"]
    if whole:
        figure, (axes,) = new_figure(6, 4)
        for i, (side, line) in enumerate(_by(whole, "side").items()):
            _line(axes, i, [row["bits"] for row in line], line, side)
        axes.set_xticks(sorted({row["bits"] for row in whole}))
        axes.set_xlabel("bits of the codes")
        axes.legend(frameon=False, title="quantized")
        caption = "What keys alone and values alone cost."
        text = f"{_setup(whole, result)} KVQuant with 1% of outliers for one side; the other is exact."
        found.append(_section("Keys and values", text, whole, ["bits", "side"], "parts", caption, figure))
    for row in rows:
        if row["side"] == "layers":
            found.append(_layers(row, result))
    return found


def _layers(row: Row, result: dict[str, Any]) -> Section:
    cells = row["layers"]
    figure, (axes,) = new_figure(6, 4)
    for i, (side, line) in enumerate(_by(cells, "side").items()):
        positions = [j + 0.4 * i - 0.2 for j in range(len(line))]
        axes.bar(positions, [cell["kld_strict"] for cell in line], 0.4, color=COLORS[i], label=side)
        axes.set_xticks(range(len(line)), [str(cell["layer"]) for cell in line])
    axes.set(xlabel="layer", ylabel=LOSS)
    axes.legend(frameon=False)
    table = Table(
        "", ["layer", "side", "KLD strict"], [[c["layer"], c["side"], c["kld_strict"]] for c in cells], {"KLD strict": 4}
    )
    text = f"{result['settings']['model']}: KVQuant with 1% of outliers at {row['bits']} bits for one part, all else exact."
    return Section("Each layer alone", text, [table], [Plot("layers", "Where quantizing costs most.", figure)])


def _texts(rows: list[Row], result: dict[str, Any]) -> list[Section]:
    widths = _by(rows, "bits")
    figure, panels = new_figure(3.4 * len(widths), 4.2, columns=len(widths))
    for axes, (bits, group) in zip(panels, widths.items(), strict=True):
        for i, (text, line) in enumerate(_by(sorted(group, key=lambda row: row["sequences"]), "text").items()):
            style: Any = style_of(i)
            axes.plot([row["sequences"] for row in line], [row["kld_strict"] for row in line], label=text, **style)
        axes.set_ylim(0, 1.2 * max(row["kld_strict"] for row in group))
        counts = sorted({row["sequences"] for row in group})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set(xlabel="sequences to learn from", title=f"{bits} bits")
    panels[0].set_ylabel(LOSS)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    caption = "How little the loss depends on the text that was learned from, and on how much of it."
    text_ = f"{_setup(rows, result)} KVQuant with 1% of outliers, learned from fewer sequences and from other texts."
    return [_section("Calibration texts", text_, rows, ["bits", "text", "sequences"], "texts", caption, figure)]


def _times(rows: list[Row], result: dict[str, Any]) -> list[Section]:
    parts = {"seconds_ranges": "first pass: ranges", "seconds_gradients": "second pass: gradients", "seconds_fit": "fit"}
    figure, (axes,) = new_figure(6.5, 0.6 + 0.5 * len(rows))
    left = [0.0] * len(rows)
    for color, (name, label) in zip(COLORS, parts.items(), strict=False):
        seconds = [row[name] for row in rows]
        axes.barh([row["label"] for row in rows], seconds, left=left, color=color, label=label)
        left = [start + more for start, more in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    threads, environment = rows[0]["threads"], result["environment"]
    text = (
        f"{result['settings']['model']}, {rows[0]['tokens']:,} tokens, by the wall clock on {environment['processor']}, "
        f"{threads} thread{'s' * (threads > 1)}, a machine in use. Both passes run the model, the second backwards too; then "
        "comes the fit."
    )
    cells = [[row["label"], *(row[name] for name in parts), total] for row, total in zip(rows, left, strict=True)]
    table = Table("Seconds", ["recipe", *parts.values(), "all"], cells)
    plot = Plot("times", "Where calibration spends its time.", figure)
    return [Section("What calibration takes", text, [table], [plot])]


MAKERS: dict[str, Callable[[list[Row], dict[str, Any]], list[Section]]] = {
    "steps": _steps,
    "grid": _grid,
    "outliers": _outliers,
    "sinks": _sinks,
    "parts": _parts,
    "texts": _texts,
    "times": _times,
}


def _setup(rows: list[Row], result: dict[str, Any]) -> str:
    """Which model, text and tokens all rows share."""
    settings, row = result["settings"], rows[0]
    return (
        f"{settings['model']} on {settings['text']}: {row['tokens']:,} tokens in windows of {row['window']}, perplexity "
        f"{row['perplexity_fp']:.3f} without quantization. Allocated bits: of a cache of {settings['context']:,} tokens."
    )


def _section(title: str, text: str, rows: list[Row], by: list[str], name: str, caption: str, figure: "Figure") -> Section:
    """A ablation as one table, arranged by entries of its rows, and one plot."""
    headings = [{"label": "ablation_step", "bits": "bits of codes"}.get(entry, entry) for entry in by]
    columns = [*headings, *(heading for heading, _ in FIGURES.values())]
    cells = [[row[entry] for entry in (*by, *FIGURES)] for row in rows]
    table = Table(caption, columns, cells, dict(FIGURES.values()) | {"fraction": 3})
    return Section(title, text, [table], [Plot(name, caption, figure)])


def _by(rows: list[Row], entry: str) -> dict[Any, list[Row]]:
    """Rows by one of their entries, in the order in which they come."""
    return {value: [row for row in rows if row[entry] == value] for value in dict.fromkeys(row[entry] for row in rows)}


def _line(axes: "Axes", i: int, x: list[Any], rows: list[Row], label: str, **options: Any) -> None:
    style: Any = style_of(i) | options
    axes.plot(x, [row["kld_strict"] for row in rows], label=label, **style)
    axes.set_ylabel(LOSS)
    log_axis(axes.yaxis)
