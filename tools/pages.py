"""What the tools that write pages share: tables, where metrics come from, and the marks between which text stands."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def hardware(result: dict[str, Any]) -> str:
    """What a result was measured on, in words."""
    found = result["environment"]
    return f"an {found['gpu']}" if found.get("gpu") else f"{found['cores']} cores of an {found['processor']}"


def source(result: dict[str, Any]) -> str:
    """Where metrics come from: the command, the hardware, the date."""
    return f"`{result['command']}` on {hardware(result)}, {result['date']}."


def replace_block(path: Path, name: str, text: str) -> None:
    """Put text between the marks `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a page.

    Marks of whole lines, text that ends one, stand on lines of their own; others may stand within a line.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    own_lines = rest.startswith("\n")
    if page.count(begin) != 1 or page.count(end) != 1 or (text.endswith("\n") and not own_lines):
        raise SystemExit(f"{path.name} has no marks for {name}: it needs one pair of marks {begin} and {end}.")
    if not own_lines and re.search(r"(^|\n)[-* ]*$", before):
        raise SystemExit(f"{path.name}: Markdown leaves a line that begins with {begin} as it is; put words in front of it.")
    gap = "\n" if own_lines else ""
    path.write_text(before + begin + gap + text.removesuffix("\n") + gap + end + rest.partition(end)[2], encoding="utf-8")
