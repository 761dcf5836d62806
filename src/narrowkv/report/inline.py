"""Pictures as part of a page: scalable, with ids of their own, in the page's colours by day and by night."""

import html
import io
import re
from typing import TYPE_CHECKING, Any

from narrowkv.report.figures import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, PAPER = "#010101", "#fefefe"  # what is to take the page's colours; numbers written on colours stay black or white


def inline_svg(figure: "Figure", prefix: str, label: str) -> str:
    """A figure as an `svg` element of HTML. prefix: of its ids, to be told from those of others. label: what it shows.

    What is black, and text that is not on colours, takes the colour of the text around it; the background is left out.
    """
    svg = _drawn(figure)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(rf"(fill|stroke): (?:{INK}|#000000)", r"\1: currentColor", svg)
    svg = svg.replace(f"fill: {PAPER}", "fill: var(--paper)").replace("stroke: #ffffff", "stroke: var(--paper)")
    width = f"{figure.get_figwidth() * 96:.0f}px"
    opening = f'<svg role="img" aria-label="{html.escape(label)}" style="--width: {width}" viewBox="{_view_box(svg)}">'
    return opening + svg[svg.index(">") + 1 :].strip()


def _drawn(figure: "Figure") -> str:
    import matplotlib

    written: Any = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()  # places all text, that of ticks too
        _mark(figure)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return written.getvalue()


def _mark(figure: "Figure") -> None:
    """Give black text that is not written on colours the colour INK, and legends the ground PAPER."""
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import to_hex
    from matplotlib.legend import Legend
    from matplotlib.text import Text

    coloured = [axes for axes in figure.axes if axes.images or axes.findobj(QuadMesh)]
    on_colours = {text for axes in coloured for text in axes.texts}
    for text in figure.findobj(Text):
        if text not in on_colours and to_hex(text.get_color()) == "#000000":
            text.set_color(INK)
    for legend in figure.findobj(Legend):
        legend.get_frame().set(facecolor=PAPER, edgecolor="none")


def _view_box(svg: str) -> str:
    found = re.search(r'viewBox="([\d. -]+)"', svg)
    assert found, "matplotlib writes a viewBox"
    return found[1]
