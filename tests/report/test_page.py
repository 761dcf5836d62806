"""The page of a report: whole in one file, traced to its sources, and as a browser shows it."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from tests.browser import Browser

from narrowkv.evaluate.results import environment
from narrowkv.report.inline import inline_svg
from narrowkv.report.page import Part, render
from narrowkv.report.plots import new_figure, style_of
from narrowkv.report.sections import Plot, Section, Table

COLUMNS = [
    "recipe",
    "bits",
    "perplexity strict",
    "perplexity stream",
    "KLD strict",
    "KLD 99%",
    "top-1",
    "recall",
    "ms a token",
]
ROWS = [
    ["nuq10", 10.0, 21.5, 21.4, 0.01, 0.1, 0.99, 0.9, 1234.5],
    ["nuq3-1% <b>", 3.56, 22.1, 21.5, 0.11, 0.9, 0.91, None, 25.5],
    ["nuq4", 4.16, 21.7, 21.5, 0.04, 0.4, 0.94, 0.89, 26.5],
]


def lines():
    figure, (axes,) = new_figure(7.5, 4)
    for i in range(3):
        axes.plot([2, 3, 4], [3 - i, 2 - i, 1 - i], label=f"recipe & {i}", **style_of(i))
    axes.set(xlabel="bits per element", ylabel="loss (nats)")
    axes.legend()
    return figure


def heat():
    figure, (axes,) = new_figure(4, 3)
    axes.imshow(np.arange(4.0).reshape(2, 2))
    axes.text(0, 0, "white", color="white")
    axes.text(1, 1, "black", color="black")
    axes.set_title("title")
    return figure


@pytest.fixture(scope="module")
def parts():
    result = {"kind": "compare", "command": "narrowkv compare 'a <model>'", "seed": 17, "date": "2026-11-25", "rows": []}
    result |= {"settings": {"window": 2048, "limit": None}, "environment": environment()}
    first = Section("Loss", "A < B.\nAnd more.", [Table("What it costs", COLUMNS, ROWS)], [Plot("loss", "Less.", lines())])
    second = Section("Where", "By depth.", [], [Plot("again", "Less.", lines()), Plot("heat", "Found & stored.", heat())])
    return [
        Part("compare", "Recipes", "compare.json", result, [first]),
        Part("tasks", "Tasks", "tasks.json", result | {"seed": 18}, [second]),
    ]


@pytest.fixture(scope="module")
def page(parts):
    return render("narrowkv://<demo>", parts)


class Read(HTMLParser):
    """What a page has: ids, references to them, addresses, text by figure."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.references, self.addresses, self.figures, self.attributes = [], set(), [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.attributes |= {name for name, _ in attributes}
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                (self.references.add(value[1:]) if value.startswith("#") else self.addresses.append(value))
            self.references |= set(re.findall(r"url\(#(.*?)\)", value or ""))
        if tag == "figure":
            self.figures.append("")

    def handle_data(self, data):
        if self.figures:
            self.figures[-1] += data


def test_every_id_is_there_once_and_nothing_is_elsewhere(page):
    read = Read(page)
    assert len(read.ids) == len(set(read.ids)) and read.references <= set(read.ids)
    files = {"compare.json", "tasks.json", "compare-loss.svg", "tasks-again.svg", "tasks-heat.svg"}
    assert {address for address in read.addresses if not address.startswith("data:")} == files
    assert not any(name.startswith("on") for name in read.attributes)


def test_foreign_text_is_escaped(page):
    assert "<demo>" not in page and "&lt;demo&gt;" in page
    assert "1% <b>" not in page and "nuq3-1% &lt;b&gt;" in page and "&lt;model&gt;" in page


def test_every_table_and_plot_names_its_source(page, parts):
    read = Read(page)
    assert len(read.figures) == 4
    for text, part in zip(read.figures, [parts[0]] * 2 + [parts[1]] * 2, strict=True):
        named = [part.file, part.result["command"], f"torch {environment()['torch']}", str(part.result["seed"])]
        assert all(words in text for words in named)


def test_plots_take_the_colors_of_the_page_except_on_colors():
    svg = inline_svg(heat(), "p1", "Found & stored.")
    fills = {words: re.findall('fill: (.*?)[;"]', style) for style, words in re.findall(r"<text (.*?)>(\w+)</text>", svg)}
    assert fills["white"] == ["#fffffe"] and fills["black"] == ["#000001"] and fills["title"] == []
    assert "stroke: currentColor" in svg and "stroke: #000000" not in svg  # axes
    assert "stroke: color-mix(in srgb, currentColor 31%, var(--paper))" in inline_svg(lines(), "p1", "")  # grid
    assert 'aria-label="Found &amp; stored."' in svg and "<metadata" not in svg


def test_long_tables_are_shown_on_request(parts):
    table = Table("Many", ["n"], [[i] for i in range(72)])
    page = render("model", [replace(parts[0], sections=[Section("Long", "", [table])])])
    assert "<summary>72 rows</summary>" in page and page.count("<tr>") == 73


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_the_window_without_errors(browser, page, tmp_path, width, dark):
    path = tmp_path / "report.html"
    path.write_text(page)
    browser.trouble.clear()
    browser.requested.clear()
    browser.open(path, width, dark)
    seen, room, window = browser.run(
        "(({ scrollWidth, clientWidth }) => [scrollWidth, clientWidth, innerWidth])(document.documentElement)"
    )
    assert window == width and seen <= room
    assert browser.run(SPILLED) == []
    assert browser.trouble == []
    assert all(address.startswith(("data:", path.as_uri())) for address in browser.requested)
    browser.screenshot(tmp_path / "page.png")
    plot = imread(io.BytesIO((tmp_path / "page.png").read_bytes()))[..., :3]
    assert plot.shape[1] == 2 * width
    ground, ink = (plot.mean(axis=2) > 0.5) == (not dark), plot.std()
    assert ground.mean() > 0.6 and ink > 0.05  # mostly paper, and something on it


SPILLED = """
[...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll > *") && !one.closest("details:not([open]) dl")
  && one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(one => one.outerHTML.slice(0, 80))
"""


def test_tables_are_sorted_by_keyboard(browser, page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page)
    browser.open(path, 1280)

    def column(i):
        return browser.run(f"[...document.querySelectorAll('tbody tr')].map(row => row.cells[{i}].textContent)")

    def sort(i, key="Enter", text="\r"):
        browser.run(f"document.querySelectorAll('thead button')[{i}].focus()")
        browser.press(key, text)
        return browser.run(f"document.querySelectorAll('thead th')[{i}].ariaSort")

    given = column(0)
    assert sort(8) == "ascending" and column(8) == ["25.50", "26.50", "1,234.50"]
    assert sort(8) == "descending" and column(8) == ["1,234.50", "26.50", "25.50"]
    assert sort(8) is None and column(0) == given
    assert sort(0, " ", " ") == "ascending" and column(0) == ["nuq3-1% <b>", "nuq4", "nuq10"]
    assert sort(7) == "ascending" and column(7) == ["0.89", "0.90", "-"]
    assert sort(7) == "descending" and column(7) == ["0.90", "0.89", "-"]
    assert browser.run("document.querySelectorAll('[aria-sort]').length") == 1
