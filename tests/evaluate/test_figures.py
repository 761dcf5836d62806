"""Figures of pages, computed from rows of results."""

import pytest

from narrowkv.errors import FileFormatError
from narrowkv.evaluate.figures import deviation, read_figure

RESULTS = {
    "one": [
        {"recipe": "narrow3", "text": "prose", "loss": 2.0, "bits": 3.0, "at": [{"tokens": 4, "bytes": 64}, {"tokens": 8}]},
        {"recipe": "narrow3", "text": "code", "loss": 4.0, "bits": 3.0},
        {"recipe": "nuq3", "text": "prose", "loss": 8.0, "bits": 3.5},
        {"recipe": "nuq3", "text": "code", "loss": 4.0, "bits": 3.25},
    ],
    "two": [{"recipe": "narrow3", "text": "prose", "loss": 1.0}, {"recipe": "nuq3", "text": "prose", "loss": 10.0}],
}
OURS = {"run": "one", "field": "loss", "rows": {"recipe": "narrow3", "text": "prose"}}
BOTH = {"recipe": "narrow3", "text": ["prose", "code"]}


def figure(**parts):
    return read_figure("the figure", OURS | parts, {"tolerance": 0.1, "tolerance_here": 0.5})


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        ({}, 2),
        ({"unit": 4}, 0.5),
        ({"rows": BOTH}, 8**0.5),
        ({"rows": BOTH, "how": "sum"}, 6),
        ({"rows": BOTH, "over": {"rows": {"recipe": "nuq3"}}}, (2 / 8 * 4 / 4) ** 0.5),
        ({"rows": BOTH, "field": "bits", "less": {"rows": {"recipe": "nuq3"}}, "how": "least"}, -0.5),
        ({"rows": BOTH, "field": "bits", "less": {"rows": {"recipe": "nuq3"}}, "how": "most"}, -0.25),
        ({"over": {"rows": {"recipe": "nuq3"}}, "terms": [{}, {"run": "two"}]}, (2 / 8 * 1 / 10) ** 0.5),
        ({"terms": [{"over": {"field": "bits"}}, {"rows": {"text": "code"}}], "how": "sum"}, 2 / 3 + 4),
        ({"within": {"at": {"tokens": 4}}, "field": "bytes"}, 64),
    ],
)
def test_a_figure_is_computed(parts, value):
    assert figure(**parts).values(RESULTS) == [pytest.approx(value)]


def test_each_has_every_value_and_none_where_a_row_is_missing():
    rows = {"recipe": ["narrow3", "nuq2", "nuq3"], "text": "prose"}
    assert figure(rows=rows, how="each").values(RESULTS) == [2, None, 8]
    assert figure(rows=rows, how="sum").values(RESULTS) == [None]
    assert figure(rows=rows, how="each", over={"run": "two"}).values(RESULTS) == [2, None, 0.8]
    assert figure(within={"at": {"tokens": 5}}, field="bytes").values(RESULTS) == [None]
    assert figure(rows={"text": []}).values(RESULTS) == [None]
    assert figure(within={"recipe": {"tokens": 5}}, field="bytes").values(RESULTS) == [None]


def test_settings_and_runs():
    one = figure(terms=[{}, {"run": "two"}], format=",.1f", tolerance=0.2)
    assert (one.tolerance, one.tolerance_here, one.here) == (0.2, 0.5, True)
    assert one.runs() == {"one", "two"} and one.shown(1234.56) == "1,234.6"


def test_the_deviation_is_relative_to_what_is_claimed():
    assert [deviation(*pair) for pair in ((4, 5), (-4, -5), (0, 0), (0, 1e-9))] == [0.25, 0.25, 0, float("inf")]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"rows": {"recipe": "narrow3", "loss": 2}, "terms": [{"run": "one", "field": "recipe"}]}, "is no number"),
        ({"how": "median"}, "unknown way, 'median'"),
        ({"format": "{0.__class__}"}, "has the format"),
        ({"format": ".9999999999f"}, "has the format"),
        ({"unit": 0}, "no unit or no terms"),
        ({"unit": float("nan")}, "is no float"),
        ({"unit": True}, "is no float"),
        ({"terms": []}, "no unit or no terms"),
        ({"terms": [3]}, "is no object"),
        ({"field": 3}, "'field' of the figure is no str"),
        ({"formula": "__import__('os')"}, "unknown entries, formula"),
        ({"within": {"at": 3}}, "no list of objects"),
        ({"over": {}, "less": {}}, "both over and less"),
        ({"over": {"rows": {"text": ["prose", "code"]}}}, "1 and 2 entries of one do not make pairs"),
        ({"rows": BOTH, "less": {"rows": {"recipe": "nuq3"}}}, "positive elements alone"),
    ],
)
def test_what_is_no_figure_is_refused_in_one_sentence(parts, words):
    with pytest.raises(FileFormatError, match=words) as error:
        figure(**parts).values(RESULTS)
    assert str(error.value).count("; ") >= 1 and str(error.value).endswith(".")


def test_a_row_is_found_by_all_its_entries():
    with pytest.raises(FileFormatError, match="2 rows of results have"):
        read_figure("the figure", OURS | {"rows": {"recipe": "narrow3", "bits": 3.0}}, {}).values(RESULTS)
    with pytest.raises(FileFormatError, match="divided by zero"):
        figure(over={"field": "bits"}).values({"one": [RESULTS["one"][0] | {"bits": 0.0}]})
    with pytest.raises(FileFormatError, match="lacks a run or a field"):
        read_figure("the figure", {"rows": {}}, {})
