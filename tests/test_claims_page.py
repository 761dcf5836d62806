"""CLAIMS.md and the sentences with figures are those of results/claims.json, and every claim stands where it says."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from narrowkv.evaluate.claims import read_claims

ROOT = Path(__file__).parents[1]
CLAIMS = read_claims(ROOT)
BLOCK = re.compile(r"<!-- (\S+):begin -->.*?<!-- \1:end -->", flags=re.S)
QUOTED = re.compile(r"```.*?```|`[^`]*`|\]\([^()]*\)|\(arXiv [\d.]+\)", flags=re.S)
MEASURED = re.compile(r"(?<![\w.-])[\d,]*\.\d+\b|\d+ ?%|\d times|\d (?:ms|s|seconds|[kMG]i?B)\b")
CLEAN = {  # pages without other figures than those of claims, but for these, which nobody measured
    "README.md": ("Python 3.10 to 3.13", "its goal, which was 4 to 5 times"),
    "docs/index.md": ("Python 3.10 to 3.13",),
    "docs/accuracy.md": ("store 512 tokens each, 7% of the cache", "less than 2.5 bits"),
    "docs/planner.md": ("1 GB is 10^9", "and 1 GiB 2^30", "65B, 32K tokens, 46.5 GB"),
}


@pytest.fixture
def writer(monkeypatch):
    """The tool."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import write_claims

    yield write_claims
    sys.modules.pop("write_claims")


def test_pages_are_up_to_date(writer, tmp_path):
    pages = {"README.md", "docs/accuracy.md", *(claim.page for claim in CLAIMS.claims.values())}
    (tmp_path / "docs").mkdir()
    for page in pages:
        shutil.copy(ROOT / page, tmp_path / page)
    writer.write_all(tmp_path)
    for page in (*pages, "CLAIMS.md"):
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"run `make results`: {page} differs"


@pytest.mark.parametrize("name", CLAIMS.claims)
def test_a_claim_stands_on_its_page(name):
    claim = CLAIMS.claims[name]
    page = (ROOT / claim.page).read_text(encoding="utf-8")
    if claim.plot:
        assert (ROOT / claim.plot).exists() and Path(claim.plot).name in page
    else:
        marks = claim.block or claim.name
        inside = page.split(f"<!-- {marks}:begin -->")[1].split(f"<!-- {marks}:end -->")[0]
        assert inside.strip() == claim.written(CLAIMS.rows(claim)) if claim.is_sentence else "|" in inside
    committed = CLAIMS.rows(claim)
    for figure in claim.figures.values():
        assert None not in figure.values(committed)


def test_every_run_is_of_a_claim():
    used = {run.name for claim in CLAIMS.claims.values() for run in CLAIMS.runs_of(claim)}
    assert used == CLAIMS.runs.keys()


def test_a_page_without_marks_is_left_alone(writer, tmp_path):
    page = tmp_path / "page.md"
    for text, words in (
        ("nothing here\n", "no marks for one"),
        ("- <!-- one:begin --><!-- one:end -->\n", "put words in front"),
    ):
        page.write_text(text)
        with pytest.raises(SystemExit, match=words):
            writer.replace_block(page, "one", "text")
        assert page.read_text() == text


def test_a_sentence_stands_within_a_line_or_on_its_own(writer, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("- Today <!-- one:begin -->old<!-- one:end -->.\n\n<!-- two:begin -->\n<!-- two:end -->\n")
    for _ in range(2):
        writer.replace_block(page, "one", "4 bits")
        writer.replace_block(page, "two", "3 bits.")
    expected = "- Today <!-- one:begin -->4 bits<!-- one:end -->.\n\n<!-- two:begin -->\n3 bits.\n<!-- two:end -->\n"
    assert page.read_text() == expected


@pytest.mark.parametrize("name", CLEAN)
def test_figures_stand_in_blocks_alone(name):
    page = QUOTED.sub("", BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8")))
    for allowed in CLEAN[name]:
        assert allowed in page
        page = page.replace(allowed, "")
    assert not MEASURED.findall(page), f"make a claim of it (CONTRIBUTING.md): {name}"
