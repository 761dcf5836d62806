"""Plots as part of a page: scalable, with ids of their own, in the page's colors by day and by night."""

import html
import io
import re
from typing import TYPE_CHECKING, Any

from narrowkv.report.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inline_svg(figure: "Figure", prefix: str, label: str) -> str:
    """A figure as an `svg` element of HTML. prefix: of its ids, to be distinguished from those of others. label: what it
    shows.

    Grays become mixtures of the page's ink (`currentColor`) and `--paper`, except for text written on colors.
    """
    svg = _drawn(figure)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"(fill|stroke): #([0-9a-f]{2})\2\2", _mixed, svg)
    width, height = (96 * inches for inches in figure.get_size_inches())
    sizes = f'style="--width: {width:.0f}px" viewBox="0 0 {0.75 * width:g} {0.75 * height:g}"'
    return f'<svg role="img" aria-label="{html.escape(label)}" {sizes}>{svg[svg.index(">") + 1 :].strip()}'


def _drawn(figure: "Figure") -> str:
    """SVG without a background, in which only grays that are to change are written as such."""
    import matplotlib
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import to_rgb

    colored = [axes for axes in figure.axes if axes.images or axes.findobj(QuadMesh)]
    for text in [text for axes in colored for text in axes.texts]:
        red, green, blue = to_rgb(text.get_color())
        text.set_color((red, green, blue + (1 / 255 if blue < 0.5 else -1 / 255)))
    for mesh in figure.findobj(QuadMesh):
        mesh.set_rasterized(True)
    written: Any = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(written, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    return written.getvalue()


def _mixed(found: re.Match[str]) -> str:
    ink = round(100 - int(found[2], 16) / 2.55)
    color = {0: "var(--paper)", 100: "currentColor"}.get(ink, f"color-mix(in srgb, currentColor {ink}%, var(--paper))")
    return f"{found[1]}: {color}"
