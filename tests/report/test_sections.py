"""Tables show elements with as many digits as asked for."""

from narrowkv.report.sections import Table


def test_numbers_are_shown_by_their_column():
    table = Table("what", ["recipe", "bits", "bytes", "recall"], [["nuq4-1%", 4.3217, 1234567, None]], {"bits": 3})
    assert table.shown(table.rows[0]) == ["nuq4-1%", "4.322", "1,234,567", "-"]
    assert table.numeric == [False, True, True, True]
