"""What a model wrote is judged by the problem's tests, within limits, and differences by pairs."""

from benchmarks import humaneval

PROBLEM = {
    "prompt": "\ndef double(x):\n    '''Twice x.'''\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}


def test_a_program_passes_where_its_tests_do():
    assert humaneval.passes(PROBLEM, "\n    return 2 * x")
    assert not humaneval.passes(PROBLEM, "\n    return x")
    assert not humaneval.passes(PROBLEM, "\n    return (")


def test_a_program_has_limits_of_time_and_memory(monkeypatch):
    monkeypatch.setattr(humaneval, "SECONDS", 1)
    assert not humaneval.passes(PROBLEM, "\n    while True: pass")
    assert not humaneval.passes(PROBLEM, "\n    return len(bytearray(2**33)) and 2 * x")


def test_the_interval_of_paired_differences():
    assert humaneval.interval([0] * 60) == (0, 0)
    low, high = humaneval.interval([-1] * 6 + [1] * 3 + [0] * 51)  # a sum of -3, of standard deviation 2.98
    assert -10 <= low <= -8 and 2 <= high <= 4
