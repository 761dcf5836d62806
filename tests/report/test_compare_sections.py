"""The table and plot of `compare`, from rows alone."""

import pytest

from narrowkv.report.compare import dearest_first, family, pareto, sections

ROW = {
    "perplexity_strict": 9.0, "perplexity_stream": 8.5, "perplexity_fp": 8.0, "kld_strict_p99": 1.0, "top1": 0.9,
    "recall": None, "recall_fp": None, "nbytes": 3_000_000, "tokens": 100, "window": 64, "stream_chunk": 16, "context": 1000,
    "decode_ms": 2.0, "decode_ms_least": 1.5, "decode_steps": 4, "load": 0.5, "threads": 1, "backend": "cpu",
}  # fmt: skip


def result(*rows):
    environment = {"processor": "a processor", "gpu": None}
    dynamic = {
        "recipe": "DynamicCache",
        "bits_per_element": 16.0,
        "nbytes": 9_000_000,
        "decode_ms": 3.0,
        "decode_ms_least": 2.0,
        "load": 2.0,
    }
    return {
        "rows": [dynamic, *(ROW | row for row in rows)],
        "settings": {"model": "m", "text": "t"},
        "environment": environment,
    }


def test_the_front_is_what_nothing_beats():
    points = [("a", 4.0, 0.1), ("b", 3.0, 0.2), ("c", 3.5, 0.3), ("d", 2.0, 0.9), ("e", 2.0, 1.0)]
    assert [name for name, _, _ in pareto(points)] == ["d", "b", "a"]


@pytest.mark.parametrize(
    ("name", "expected"), [("nuq3-1%", "nuqB-1%"), ("narrow2.5", "narrowB"), ("kivi-2-g32", "kivi-B-g32")]
)
def test_families(name, expected):
    assert family(name) == expected


def test_a_section_has_all_rows_and_a_plot():
    rows = [("int4", 4.2, 0.2), ("nuq4", 4.1, 0.1), ("nuq2", 2.1, 0.4), ("fp16", 16.0, 0.0)]
    rows = [{"recipe": name, "bits_per_element": bits, "kld_strict": loss} for name, bits, loss in rows]
    (section,) = sections(result(*rows))
    (table,), (plot,) = section.tables, section.plots
    assert [row[0] for row in table.rows] == ["DynamicCache", "fp16", "nuq4", "int4", "nuq2"]
    assert table.shown(table.rows[2])[:4] == ["nuq4", "4.10", "3.00", "9.000"]
    assert table.rows[0][3] == 8.0 and table.rows[0][5] is None
    assert "machine in use where 0.5 to 2.0 processes" in section.text and "1 thread," in section.text
    (axes,) = plot.figure.axes
    assert [text.get_text() for text in axes.texts] == ["nuq2", "nuq4"] and axes.get_xlabel() and axes.get_ylabel()
    assert sections(result()) == []


def test_a_plot_shows_the_rates_of_all_layers():
    rates = {"keys": {"0": [2, 1, 1], "3": [0, 0, 4]}, "values": {"0": [1, 3, 0], "3": [2, 0, 2]}}
    row = {"recipe": "narrow2", "bits_per_element": 2.05, "kld_strict": 0.1, "rates": rates}
    _, section = sections(result(row))
    (plot,) = section.plots
    keys, values, _ = plot.figure.axes
    assert keys.images[0].get_array().tolist() == [[2, 1, 0, 0], [2, 2, 2, 2]]
    assert values.images[0].get_array().tolist() == [[1, 1, 1, 0], [2, 2, 0, 0]]
    assert plot.name == "rates-narrow2"


def test_a_layer_of_fewer_units_is_filled_up():
    assert dearest_first([1, 0, 2], 5) == [2, 2, 0, 0, 0]
