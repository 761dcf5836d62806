"""How plots look: one style, colors that color-blind readers can tell apart, the same file when drawn again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowkv.errors import MissingPackageError
from narrowkv.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe and Ito
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
STYLE: Any = {
    "svg.hashsalt": "narrowkv",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", list["Axes"]]:
    """A figure of this size in inches, and its panels in reading order; options: of `Figure.subplots`.

    Raises MissingPackageError where matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("Plots need matplotlib; install it with `pip install 'narrowkv[report]'`.") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(panels.flat)


def style_of(i: int) -> dict[str, Any]:
    """Color and marker of the i-th line."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)]}


def log_axis(axis: Any) -> None:
    """Make an axis (`axes.xaxis`, `axes.yaxis`) logarithmic, with plain elements at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))


def save(figure: "Figure", path: Path) -> None:
    """Write a plot, SVG or PNG by the name's ending, atomically."""
    import matplotlib

    kind = path.suffix.removeprefix(".") or "svg"
    options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
    with matplotlib.rc_context(STYLE):
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, **options))
