"""Tables of the pages are those of the files of results, and the site builds without a warning and needs no network."""

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITERS = (
    "real",
    "summary",
    "accuracy",
    "measured",
    "demo",
    "plan",
    "training",
    "speed",
    "builtin",
    "tasks",
)
WRITTEN = ("accuracy", "evaluation", "inspect", "planner", "results", "serve", "tasks", "training")
PAGES = ("README.md", *(f"docs/{name}.md" for name in WRITTEN))
PLOTS = (
    "real",
    "demo",
    "planner",
    "growth",
    "evaluation-pareto",
    "evaluation-steps",
    "tasks-passkey",
    "inspect-ranges",
)


@pytest.fixture
def writer(monkeypatch, tmp_path):
    """The tool, on copies of the pages."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import write_results

    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.setattr(write_results, "ROOT", tmp_path)
    monkeypatch.setattr(write_results, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(write_results, "MEASURED", tmp_path / "measured.json")
    yield write_results
    for module in ("write_results", "speed_tables", "demo_tables", "task_tables"):
        sys.modules.pop(module)


def test_pages_are_up_to_date(writer, tmp_path):
    measured = writer.MEASURED
    for write in WRITERS:
        getattr(writer, f"write_{write}")()
    assert measured.read_text() == (ROOT / "src" / "narrowkv" / "methods" / "measured.json").read_text()
    for page in PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"run `make results`: {page} differs"
    for plot in PLOTS:
        assert (tmp_path / "docs" / f"{plot}.svg").read_text().rstrip().endswith("</svg>")


def test_a_page_without_marks_is_left_alone(writer, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(SystemExit, match="no marks for demo"):
        writer.replace_block(page, "demo", "text\n")
    assert page.read_text() == "nothing here\n"


def test_the_site_builds_and_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))  # raises on a warning
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "arithmatex" not in text, f"{page.name} has a formula that did not become MathML"
        for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", text):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag) or 'rel="canonical"' in tag, f"{page.name}: {tag}"
    assert (tmp_path / "concepts.html").read_text(encoding="utf-8").count("<math") > 30
