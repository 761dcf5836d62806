import pytest

from narrowkv.evaluate.task_metrics import all_found, any_found, f1, first_line_f1, number


@pytest.mark.parametrize(
    ("metric", "given", "accepted", "score"),
    [
        (f1, "The silent harbour!", ["a silent harbour"], 1.0),
        (f1, "silent silent harbour", ["silent harbour"], 0.8),
        (f1, "one two", ["three", "two"], 2 / 3),
        (f1, "", ["two"], 0.0),
        (first_line_f1, "\nsilent harbour\nQuestion: and then?", ["silent harbour"], 1.0),
        (number, "Paragraph 12, or Paragraph 3", ["Paragraph 12"], 0.5),
        (number, "none", ["12"], 0.0),
        (all_found, "It is ABC and def.", ["abc", "DEF", "ghi", "jkl"], 0.5),
        (any_found, "It is ABC.", ["abc", "def"], 1.0),
        (any_found, "It is.", ["abc", "def"], 0.0),
    ],
)
def test_metrics_of_known_answers(metric, given, accepted, score):
    assert metric(given, accepted) == pytest.approx(score)
