"""The table and the plot of `compare`: what recipes cost at how many bits."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from narrowkv.evaluate.compare import DYNAMIC
from narrowkv.report.plots import log_axis, new_figure, style_of
from narrowkv.report.sections import Plot, Section, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Point = tuple[str, float, float]  # a recipe's name, bits, loss

COLUMNS = {  # entry of a row: heading, digits
    "perplexity_strict": ("perplexity strict", 3),
    "perplexity_stream": ("stream", 3),
    "kld_strict": ("KLD strict", 4),
    "kld_strict_p99": ("KLD 99%", 3),
    "top1": ("top-1", 3),
    "recall": ("recall", 3),
    "decode_ms": ("ms a token", 2),
    "decode_ms_least": ("least", 2),
}
RATES = (
    "Coefficients of keys and of values, in units of 8, lie in the order of what their errors cost; each has as many bits as "
    "pay for themselves, the same in all heads of a layer. The palest have none: those coefficients are left out."
)


def sections(result: dict[str, Any]) -> list[Section]:
    """From what `read_result` returns of a file that `compare` wrote."""
    rows = [row for row in result["rows"] if row["recipe"] != DYNAMIC]
    if not rows:
        return []
    names = ", ".join(name for name, _, _ in pareto([_point(row) for row in rows if row["kld_strict"] > 0]))
    plot = Plot("pareto", f"Nothing measured here loses less at as few bits as: {names}.", _drawn(rows))
    found = [Section("What recipes cost", _text(rows, result), [_table(rows, result)], [plot])]
    allocated = [row for row in rows if row.get("rates")]
    return found + ([Section("Where the bits went", RATES, [], [_rates(row) for row in allocated])] if allocated else [])


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those points that no other beats in bits and loss at once, by bits."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: point[1:]):
        if not front or point[2] < front[-1][2]:
            front.append(point)
    return front


def draw_pareto(axes: "Axes", points: Sequence[Point]) -> None:
    """Loss over bits: a color and marker for each family of recipes (names that differ in bits), the best ones joined.

    Recipes that lose nothing are left out, since a logarithmic axis has no zero.
    """
    shown = sorted((point for point in points if point[2] > 0), key=lambda point: point[1])
    families: dict[str, list[Point]] = {}
    for point in shown:
        families.setdefault(family(point[0]), []).append(point)
    front = pareto(shown)
    axes.plot(*_coordinates(front), color="#cccccc", linewidth=8, solid_capstyle="round", zorder=1, label="least at its bits")
    for i, name in enumerate(sorted(families)):
        style: Any = style_of(i)
        axes.plot(*_coordinates(families[name]), linewidth=1, label=name, zorder=2, **style)
    for name, bits, loss in front:
        axes.annotate(name, (bits, loss), (-7, -5), textcoords="offset points", ha="right", va="top", fontsize=8)
    axes.set_ylabel("KL divergence from the exact model, strict (nats)")
    log_axis(axes.yaxis)
    axes.margins(x=0.18, y=0.12)


def family(recipe: str) -> str:
    """A recipe's name with its bits left open: `nuqB-1%` of `nuq3-1%`."""
    return re.sub(r"\d+(\.\d+)?", "B", recipe, count=1)


def _coordinates(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [bits for _, bits, _ in points], [loss for _, _, loss in points]


def _point(row: Row) -> Point:
    return row["recipe"], row["bits_per_element"], row["kld_strict"]


def _drawn(rows: list[Row]) -> "Figure":
    figure, (axes,) = new_figure(7.5, 5)
    draw_pareto(axes, [_point(row) for row in rows])
    axes.set_xlabel(f"allocated bits per element, in a cache of {rows[0]['context']:,} tokens")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, title="B: bits of the codes", title_fontsize=8)
    return figure


def _rates(row: Row) -> Plot:
    """The bits of every unit of every layer: a row of cells for each layer, one panel each for keys and values."""
    layers = list(row["rates"]["keys"])
    units = max(sum(counts) for side in row["rates"].values() for counts in side.values())
    most = max(len(counts) for side in row["rates"].values() for counts in side.values()) - 1
    figure, panels = new_figure(8, 1.6 + 0.14 * len(layers), 1, 2, sharey=True)
    image = None
    for axes, (name, side) in zip(panels, row["rates"].items(), strict=True):
        cells = [dearest_first(counts, units) for counts in side.values()]
        extent = (0, 8 * units, len(layers), 0)
        image = axes.imshow(cells, aspect="auto", extent=extent, cmap="YlGnBu", vmin=0, vmax=most, interpolation="nearest")
        axes.set_title(name)
        axes.set_xlabel("coefficients, dearest first")
        axes.grid(False)
    panels[0].set_ylabel("layer")
    assert image is not None
    figure.colorbar(image, ax=panels, label="bits", pad=0.02)
    return Plot(f"rates-{row['recipe']}", f"Bits of coefficients under {row['recipe']}.", figure)


def dearest_first(counts: Sequence[int], units: int) -> list[int]:
    """The rate of every unit, highest first; of a layer that has fewer units the rest is 0."""
    rates = [rate for rate in reversed(range(len(counts))) for _ in range(counts[rate])]
    return rates + [0] * (units - len(rates))


def _table(rows: list[Row], result: dict[str, Any]) -> Table:
    """Least divergence first, after transformers' own cache."""
    perplexity, recall = rows[0]["perplexity_fp"], rows[0]["recall_fp"]
    exact = {"perplexity_strict": perplexity, "perplexity_stream": perplexity, "recall": recall}
    dynamic = [row | exact for row in result["rows"] if row["recipe"] == DYNAMIC]
    cells = [
        [row["recipe"], row["bits_per_element"], row["nbytes"] / 1e6, *(row.get(name) for name in COLUMNS)]
        for row in dynamic + sorted(rows, key=lambda row: row["kld_strict"])
    ]
    headings = ["recipe", "bits", "MB", *(heading for heading, _ in COLUMNS.values())]
    return Table("Least divergence first", headings, cells, dict(COLUMNS.values()))


def _text(rows: list[Row], result: dict[str, Any]) -> str:
    settings, first = result["settings"], rows[0]
    recall = "" if first["recall_fp"] is None else f", recall {first['recall_fp']:.0%}"
    text = (
        f"{settings['model']} on {settings['text']}: {first['tokens']:,} tokens in windows of {first['window']}, perplexity "
        f"{first['perplexity_fp']:.3f} without quantization{recall}. bits, MB: allocated by a cache of {first['context']:,} "
        "tokens, everything counted. strict: every element attended to is quantized; KLD (nats), top-1 (the most likely next "
        f"token stays the same) and recall are strict too. stream: chunks of {first['stream_chunk']} tokens attend exactly to "
        "themselves and to the packed past."
    )
    if first["decode_ms"] is None:
        return text
    environment, threads = result["environment"], first["threads"]
    on_gpu = str(settings.get("device", "cpu")).startswith("cuda")
    machine = environment["gpu"] if on_gpu else f"{environment['processor']}, {threads} thread{'s' * (threads > 1)}"
    loads = [row["load"] for row in result["rows"] if row["load"] is not None]
    load = f" where {min(loads):.1f} to {max(loads):.1f} processes wanted to run" if loads else ""
    return (
        f"{text} ms a token: the whole model over such a cache, median and least of {first['decode_steps']} tokens by the "
        f"wall clock on {machine}, backend {', '.join(sorted({row['backend'] for row in rows}))}; one recipe after another "
        f"on a machine in use{load}, so small differences say nothing. {DYNAMIC} is transformers' own cache."
    )
