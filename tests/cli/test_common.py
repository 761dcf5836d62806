"""What the commands share."""

from narrowkv.cli.common import show_sections
from narrowkv.report.plots import new_figure
from narrowkv.report.sections import Plot, Section, Table


def test_sections_are_printed_and_their_plots_saved(tmp_path, capsys):
    figure, (axes,) = new_figure(4, 3)
    axes.plot([1, 2], [3, 4])
    table = Table("what [bold] is", ["recipe", "bits"], [["int4", 4.25], ["[red]", None]])
    show_sections([Section("Loss", "All [of] it.", [table], [Plot("loss", "less", figure)])], tmp_path, "compare")
    printed = capsys.readouterr().out
    for words in ("Loss", "All [of] it.", "what [bold] is", "4.25", "[red]", "less"):
        assert words in printed
    assert [path.name for path in tmp_path.iterdir()] == ["compare-loss.svg"]
