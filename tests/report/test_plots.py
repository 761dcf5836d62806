"""Plots: the same file when drawn again, nothing left behind, and a sentence where matplotlib is missing."""

import sys

import pytest

from narrowkv.errors import MissingPackageError, OutputError
from narrowkv.report.plots import new_figure, save, style_of


def drawn():
    figure, (axes,) = new_figure(4, 3)
    axes.plot([1, 2, 3], [3, 1, 2], label="a line", **style_of(1))
    axes.set_xlabel("tokens")
    return figure


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_plot_is_identical_when_drawn_again(tmp_path, ending):
    paths = [tmp_path / f"{i}.{ending}" for i in range(2)]
    for path in paths:
        save(drawn(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_an_interrupted_write_leaves_no_file(tmp_path):
    with pytest.raises((OutputError, ValueError)):
        save(drawn(), tmp_path / "picture.nothing")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        new_figure(4, 3)
