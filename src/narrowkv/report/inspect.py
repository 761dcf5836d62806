"""What is quantized, in plots."""

from typing import TYPE_CHECKING, Any

from narrowkv.report.plots import COLORS, MARKERS, new_figure, style_of
from narrowkv.report.sections import Plot, Section, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from narrowkv.report.sections import Cell

TITLES = {"keys": "keys", "rotated": "keys after RoPE", "values": "values"}
COLOR = {"keys": COLORS[0], "rotated": COLORS[4], "values": COLORS[1]}
RANGES = ("t99", "t99.9", "t99.99", "t100")
NO_ROPE = (
    "Its cache is given keys that no rotary embedding known to NarrowKV rotates afterwards, so there is one plot of them "
    "and none before and after the rotary embedding."
)


def sections(result: dict[str, Any]) -> list[Section]:
    """Plots and tables of what `narrowkv inspect` has written; none where that was interrupted before its end."""
    rows: list[dict[str, Any]] = result["rows"]
    if not any(row["what"] == "distribution" and row["tensor"] == "values" for row in rows):
        return []
    by_kind = {
        what: [row for row in rows if row["what"] == what] for what in ("layer", "outliers", "heat map", "distribution")
    }
    layer = by_kind["heat map"][0]["layer"]
    rotary = layer in _rotary(by_kind["heat map"])
    return [
        Section(
            f"What layer {layer} stores",
            f"Magnitudes of keys and values of layer {layer}. " + (_about_rope(by_kind["outliers"]) if rotary else NO_ROPE),
            [_outlier_table(by_kind["outliers"])],
            [
                _magnitude(by_kind["heat map"], rotary),
                _outliers(by_kind["outliers"], rotary),
                _distribution(by_kind["distribution"]),
            ],
        ),
        Section(
            "What the layers store",
            "t99 is the magnitude that 99% of a layer's elements do not exceed, t100 the largest; the first token, an "
            "attention sink, is left out of these and has a column of its own. Fisher: the mean squared gradient of the "
            "summed loss of a sequence, in nats, by one stored element.",
            [_layer_table(by_kind["layer"])],
            [_ranges(by_kind["layer"]), _fisher(by_kind["layer"])],
        ),
    ]


def _about_rope(rows: list[dict[str, Any]]) -> str:
    part = {row["tensor"]: f"{row['in_fullest_channels']:.0%}" for row in rows}
    return (
        "Where whole channels are large, ranges by channel fit; where single tokens are, ranges by token. The fullest "
        f"tenth of the channels has {part['keys']} of the elements beyond t99 of the keys before the rotary embedding, "
        f"{part['rotated']} after it, and {part['values']} of those of the values."
    )


def _rotary(rows: list[dict[str, Any]]) -> set[int]:
    """The layers whose keys are seen before and after the rotary embedding."""
    return {row["layer"] for row in rows if row["tensor"] == "rotated"}


def _title(tensor: str, rotary: bool) -> str:
    return "keys before RoPE" if rotary and tensor == "keys" else TITLES[tensor]


def _magnitude(rows: list[dict[str, Any]], rotary: bool) -> Plot:
    figure, panels = new_figure(3.2 * len(rows) + 1.2, 4.2, 1, len(rows), sharey=True)
    cells = sorted(cell for row in rows for line in row["magnitude"] for cell in line)
    top = cells[int(0.999 * (len(cells) - 1))]  # a few cells beyond it would leave all others dark
    image = None
    for axes, row in zip(panels, rows, strict=True):
        by_token = list(zip(*row["magnitude"], strict=True))
        extent = (0, row["channels"], row["tokens"], 0)
        image = axes.imshow(by_token, aspect="auto", extent=extent, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        axes.set_title(_title(row["tensor"], rotary))
        axes.set_xlabel("channel")
        axes.grid(False)
    panels[0].set_ylabel("token")
    assert image is not None
    figure.colorbar(image, ax=panels, label="mean magnitude in a cell", extend="max", pad=0.02)
    caption = f"Layer {rows[0]['layer']}, one sequence: magnitudes by channel and token, on one scale of colors."
    return Plot("magnitude", caption, figure)


def _outliers(rows: list[dict[str, Any]], rotary: bool) -> Plot:
    figure, panels = new_figure(3.2 * len(rows), 4.6, 2, len(rows), sharey="row")
    for i, row in enumerate(rows):
        for axes, side, unit in ((panels[i], "by_channel", "channels"), (panels[len(rows) + i], "by_token", "tokens")):
            shares, width = row[side], row[unit] / len(row[side])
            edges = [i * width for i in range(len(shares))]
            axes.bar(edges, [100 * share for share in shares], width, align="edge", color=COLOR[row["tensor"]])
            axes.set_xlabel(unit.removesuffix("s"))
            axes.set_xlim(0, row[unit])
            axes.grid(axis="x", visible=False)
        panels[i].set_title(_title(row["tensor"], rotary))
    for axes in (panels[0], panels[len(rows)]):
        axes.set_ylabel("elements beyond t99, %")
    caption = f"Layer {rows[0]['layer']}: where the 1% of the elements that are largest sit, by channel and by token."
    return Plot("outliers", caption, figure)


def _distribution(rows: list[dict[str, Any]]) -> Plot:
    figure, panels = new_figure(9, 3.8, 1, 2)
    for axes, row in zip(panels, rows, strict=True):
        bins, levels = len(row["density"]), row["codebook"]
        edges = [2 * i / bins - 1 for i in range(bins + 1)]
        axes.stairs(row["density"], edges, fill=True, color="#D9D9D9", label="elements")
        if any(row["weight"]):
            axes.stairs(row["weight"], edges, color=COLORS[2], linewidth=1.4, label="Fisher weight")
        top = 1.08 * max(row["density"] + row["weight"])
        axes.vlines(levels, 0, top, color=COLORS[1], linewidth=1.4, label="fitted codebook")
        evenly = [2 * i / (len(levels) - 1) - 1 for i in range(len(levels))]
        axes.plot(evenly, [top] * len(evenly), "v", color="black", markersize=5, clip_on=False, label="evenly spaced levels")
        axes.set_title(f"{TITLES[row['tensor']]}, {row['bits']} bits", pad=12)
        axes.set_xlabel("number, normalized to the range of its vector")
        axes.set_ylim(0, top)
    panels[0].set_ylabel("density")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    caption = (
        f"Layer {rows[0]['layer']}: levels of the fitted codebook lie where elements, weighed by Fisher information, are."
    )
    return Plot("distribution", caption, figure)


def _ranges(rows: list[dict[str, Any]]) -> Plot:
    figure, panels = new_figure(9, 3.6, 1, 2, sharey=True)
    for axes, tensor in zip(panels, ("keys", "values"), strict=True):
        of_tensor = [row for row in rows if row["tensor"] == tensor]
        layers = [row["layer"] for row in of_tensor]
        for i, label in enumerate(RANGES):
            axes.plot(layers, [row[label] for row in of_tensor], label=label, **style_of(i))
        axes.set_title(tensor)
        axes.set_ylim(bottom=0)
        _layer_axis(axes, layers)
    panels[0].set_ylabel("magnitude")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    return Plot("ranges", "The last percent of the elements widens the range of a layer: t99 to t100, by layer.", figure)


def _fisher(rows: list[dict[str, Any]]) -> Plot:
    figure, (axes,) = new_figure(6, 3.4)
    for marker, tensor in zip(MARKERS, ("keys", "values"), strict=False):
        of_tensor = [row for row in rows if row["tensor"] == tensor]
        layers = [row["layer"] for row in of_tensor]
        axes.plot(layers, [row["fisher"] for row in of_tensor], label=tensor, color=COLOR[tensor], marker=marker)
    _layer_axis(axes, layers)
    axes.set_yscale("log")
    axes.set_ylabel("mean squared gradient")
    axes.legend(frameon=False)
    return Plot("fisher", "How much the loss depends on a stored element, by layer.", figure)


def _layer_axis(axes: "Axes", layers: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _outlier_table(rows: list[dict[str, Any]]) -> Table:
    columns = ["elements", "t99", "in the fullest 10% of channels, %", "in the fullest 10% of tokens, %"]
    rotary = _rotary(rows)
    cells: list[list[Cell]] = [
        [
            _title(row["tensor"], row["layer"] in rotary),
            row["beyond"],
            100 * row["in_fullest_channels"],
            100 * row["in_fullest_tokens"],
        ]
        for row in rows
    ]
    return Table("Where the elements beyond t99 are", columns, cells, {columns[2]: 0, columns[3]: 0})


def _layer_table(rows: list[dict[str, Any]]) -> Table:
    columns, rotary = ["layer", "elements", *RANGES, "first token", "Fisher, 1e-6"], _rotary(rows)
    cells: list[list[Cell]] = [
        [
            row["layer"],
            _title(row["tensor"], row["layer"] in rotary),
            *(row[label] for label in RANGES),
            row["first_token"],
            1e6 * row["fisher"],
        ]
        for row in rows
    ]
    return Table("Magnitudes and Fisher weight by layer", columns, cells, {"Fisher, 1e-6": 1})
