"""The demo in full: what it must write, and what the built-in model must show."""

import pytest

from narrowkv.cli.main import run
from narrowkv.evaluate.results import read_result

pytestmark = pytest.mark.alone
KEYS = {
    *("recipe", "bits_per_element", "nbytes", "nbytes_fp16", "perplexity_strict", "perplexity_stream", "perplexity_fp"),
    *("kld_strict", "kld_strict_p99", "recall", "recall_fp"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.json"
    with pytest.raises(SystemExit) as stop:
        run(["demo", "--recall-rows", "128", "--json", str(path)])
    assert not stop.value.code
    return {row["recipe"]: row for row in read_result(path, "demo")["rows"]}


def test_every_recipe_has_every_metric(rows):
    assert set(rows) >= {
        "fp16",
        "narrow4",
        "narrow3",
        "narrow2",
        "int4",
        "int3",
        "int2",
        "nuq4-1%",
        "nuq3-1%",
        "nuq2-1%",
        "nuq4",
        "nuq3",
        "nuq2",
    }
    for row in rows.values():
        assert set(row) >= KEYS
        assert row["nbytes"] / row["nbytes_fp16"] == pytest.approx(row["bits_per_element"] / 16)


def test_bits_are_near_their_name(rows):
    assert 16 <= rows["fp16"]["bits_per_element"] < 16.1
    for bits in (2, 3, 4):
        assert bits - 0.1 < rows[f"narrow{bits}"]["bits_per_element"] < min(bits + 0.1, rows[f"nuq{bits}"]["bits_per_element"])
        for name in (f"nuq{bits}", f"nuq{bits}-1%", f"int{bits}"):
            assert bits < rows[name]["bits_per_element"] < bits + 0.7


def test_exact_storage_loses_nothing(rows):
    assert rows["fp16"]["kld_strict"] == pytest.approx(0, abs=1e-6)
    assert rows["fp16"]["recall"] == rows["fp16"]["recall_fp"]


def test_four_bits_are_nearly_lossless(rows):
    row = rows["nuq4-1%"]
    assert row["perplexity_strict"] < 1.02 * row["perplexity_fp"]
    assert row["perplexity_stream"] < 1.02 * row["perplexity_fp"]
    assert row["recall"] >= row["recall_fp"] - 0.02


def test_loss_grows_as_bits_fall(rows):
    divergence = {name: row["kld_strict"] for name, row in rows.items()}
    assert divergence["nuq4-1%"] < divergence["nuq3-1%"] < divergence["nuq2-1%"]
    for bits in (4, 3, 2):
        assert divergence[f"narrow{bits}"] < 0.75 * divergence[f"nuq{bits}-1%"]
        assert divergence[f"nuq{bits}-1%"] < 0.6 * divergence[f"int{bits}"]
    assert rows["int2"]["perplexity_strict"] > 1.3 * rows["int2"]["perplexity_fp"]
    assert rows["int2"]["recall"] < 0.5 * rows["int2"]["recall_fp"]


def test_the_model_recalls(rows):
    assert rows["fp16"]["recall_fp"] >= 0.9
