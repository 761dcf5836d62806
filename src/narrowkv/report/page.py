"""The page of a report: one HTML file that needs nothing else, of sections and of what made their metrics."""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from narrowkv.report.inline import inline_svg
from narrowkv.report.sections import Section

MANY = 24  # rows of a table beyond which it is collapsed
VERSIONS = ("narrowkv", "torch", "transformers", "python")


@dataclass(frozen=True)
class Part:
    """What one file of results gives. file: its name, next to the page. result: what `read_result` returns of it."""

    kind: str
    title: str
    file: str
    result: dict[str, Any]
    sections: list[Section]

    def facts(self) -> dict[str, str]:
        """What made the metrics, in words."""
        environment = self.result["environment"]
        return {
            "Date": self.result["date"],
            "Machine": _machine(environment),
            "Versions": ", ".join(f"{name} {environment[name]}" for name in VERSIONS),
            "Seed": str(self.result["seed"]),
        }


def render(model: str, parts: Sequence[Part]) -> str:
    """The page as HTML. It loads nothing and sends nothing, which its Content-Security-Policy has the browser enforce.

    Every table and plot names its file, and the command, versions and seed that made it.
    """
    templates = Environment(
        loader=PackageLoader("narrowkv", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_source(templates, name) for name in ("page.css", "page.js"))
    return templates.get_template("page.html").render(
        model=model,
        parts=parts,
        facts=_distinct(parts),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        svg=_numbered(),
        as_json=json.dumps,
        many=MANY,
    )


def _source(templates: Environment, name: str) -> str:
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]


def _numbered() -> Callable[[Any], str]:
    """Draws plots, each with ids of its own."""
    count = 0

    def draw(plot: Any) -> str:
        nonlocal count
        count += 1
        return inline_svg(plot.figure, f"p{count}", plot.caption)

    return draw


def _distinct(parts: Sequence[Part]) -> dict[str, list[str]]:
    """Each fact once, however many parts share it."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        for name, words in part.facts().items():
            found.setdefault(name, {})[words] = None
    return {name: list(words) for name, words in found.items()}


def _machine(environment: dict[str, Any]) -> str:
    cores, threads = environment["cores"], environment["threads"]
    notes = f"{environment['processor']}, {cores} {'core' if cores == 1 else 'cores'}"
    notes += f", {threads} {'thread' if threads == 1 else 'threads'}"
    return f"{notes}, {environment['gpu']}" if environment["gpu"] else notes
