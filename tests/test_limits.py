"""The tables of the page that says when not to use NarrowKV are those of the files of results."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "limits.md"


@pytest.fixture
def writer(monkeypatch, tmp_path):
    """The tool, on a copy of the page."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import limits_tables

    shutil.copy(PAGE, tmp_path / PAGE.name)
    monkeypatch.setattr(limits_tables, "DOCS", tmp_path)
    yield limits_tables
    for name in ("limits_tables", "write_results"):
        sys.modules.pop(name)


def test_the_page_is_up_to_date(writer, tmp_path):
    writer.write_limits()
    assert (tmp_path / PAGE.name).read_text() == PAGE.read_text(), "run `make results`"


def test_fixed_costs_are_counted_in_full(writer):
    table = writer.short_contexts().split("\n\n")[0].splitlines()
    rows = {cells[1].strip("` "): [float(cell) for cell in cells[2:-1]] for cells in (row.split("|") for row in table[2:])}
    assert rows["kivi-2"][0] > 2 * 2 and all(row == sorted(row, reverse=True) for row in rows.values())
