"""Formulas of the docs site become MathML while it is built, so that reading them needs neither a script nor the network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return FORMULA.sub(
        lambda match: convert(html.unescape(match[3]), display="block" if match[2] == "[" else "inline"), content
    )
