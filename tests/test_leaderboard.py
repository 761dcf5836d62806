"""The leaderboard is that of the files of results, needs no network, and sorts in a real browser."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.browser import Browser

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "leaderboard.html"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import leaderboard

    yield leaderboard
    sys.modules.pop("leaderboard")


def test_the_page_is_up_to_date(tool, tmp_path):
    tool.write_leaderboard(page=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == PAGE.read_text(), "run `make results`"


def test_every_row_of_a_real_model_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    result = json.loads((ROOT / "results" / "real" / "gemma-3-270m.json").read_text())
    for row in result["rows"]:
        if row["tables"] == "mix":
            assert f'data-value="{row["kld_strict"]}"' in text and f">{row['recipe']}</th>" in text
    assert not re.search(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="https?:', text)


def test_files_of_new_results_come_along(tool, tmp_path):
    shutil.copytree(ROOT / "results" / "real", tmp_path / "real")
    result = json.loads((tmp_path / "real" / "gemma-3-270m.json").read_text())
    row = {"recipe": "narrow3", "tokens": 2048, "batch": 1, "threads": 2, "torch_uses": "AVX2"}
    result |= {"kind": "attention", "settings": {}, "rows": [row | {"milliseconds": 1.25, "ratio_bfloat16": 0.9}]}
    (tmp_path / "speed.json").write_text(json.dumps(result))
    tool.write_leaderboard(tmp_path, tmp_path / "page.html")
    assert 'data-value="1.25"' in (tmp_path / "page.html").read_text()


def test_a_click_sorts_in_a_browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(PAGE, 1280)
        assert browser.trouble == []
        table = "document.querySelector('main table')"
        browser.run(f"{table}.querySelectorAll('thead button')[2].click()")
        values = browser.run(f"[...{table}.querySelectorAll('tbody tr')].map(row => Number(row.cells[2].dataset.value))")
        assert len(values) > 5 and values == sorted(values)
        assert all(address.startswith(("data:", PAGE.as_uri())) for address in browser.requested)
    finally:
        browser.close()
