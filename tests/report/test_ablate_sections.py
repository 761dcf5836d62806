"""Tables and plots of `ablate`, from rows alone."""

from narrowkv.report.ablate import sections

FIGURES = {
    "bits_per_element": 3.2, "perplexity_strict": 9.0, "perplexity_stream": 8.5, "perplexity_fp": 8.0, "kld_strict_p99": 1.0,
    "top1": 0.9, "tokens": 63, "window": 64,
}  # fmt: skip


def result(*rows):
    settings = {"model": "m", "text": "t", "context": 128}
    return {"rows": list(rows), "settings": settings, "environment": {"processor": "a processor"}}


def row(ablation, loss=0.1, **parameters):
    return {"ablation": ablation, "label": f"step {parameters}", **parameters, **FIGURES, "kld_strict": loss}


def test_each_ablation_becomes_a_section():
    rows = [
        *(row("steps", 0.1 * (bits + step), bits=bits, step=step) for bits in (2, 3) for step in range(3)),
        *(row("grid", bits=3, side=side, range=kind) for side in ("keys", "values") for kind in ("channel", "token")),
        *(row("outliers", bits=3, fraction=part) for part in (0.0, 0.001)),
        *(row("sinks", bits=3, fraction=0.0, sinks=count) for count in (0, 1)),
        *(row("parts", bits=3, side=side) for side in ("keys", "values", "both")),
        {
            "ablation": "parts",
            "side": "layers",
            "bits": 2,
            "layers": [{"layer": 0, "side": s, "kld_strict": 0.1} for s in "kv"],
        },
        *(row("texts", bits=3, text=text, sequences=count) for text in ("one", "two") for count in (1, 2)),
        {"ablation": "times", "label": "nuq3", "tokens": 9, "threads": 1}
        | dict.fromkeys(("seconds_ranges", "seconds_gradients", "seconds_fit"), 1.5),
    ]
    found = sections(result(*rows))
    names = [plot.name for section in found for plot in section.plots]
    assert names == ["steps", "grid", "outliers", "sinks", "parts", "layers", "texts", "times"]
    for section in found:
        (table,) = section.tables
        assert all(len(table.shown(cells)) == len(table.columns) for cells in table.rows)
        assert all(axes.get_xlabel() or axes.get_xticklabels() for axes in section.plots[0].figure.axes)
    assert found[0].tables[0].rows[1][-3] == 0.30000000000000004
    assert found[-1].tables[0].rows == [["nuq3", 1.5, 1.5, 1.5, 4.5]]
    (lines,) = (section.plots[0].figure.axes[0].lines for section in found[:1])
    assert [line.get_label() for line in lines] == ["2 bits", "3 bits"]


def test_no_rows_no_sections():
    assert sections(result()) == []
