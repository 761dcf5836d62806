"""What a model answered is judged, within limits, and differences by pairs."""

import argparse

import pytest
import torch
from benchmarks.real_models import Subject
from benchmarks.tasks import __main__ as tasks
from benchmarks.tasks import caches, completion, gsm8k, humaneval, retrieval, tool_calls

from narrowkv import get_recipe, load_model

PROBLEM = {
    "prompt": "\ndef double(x):\n    '''Twice x.'''\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}
KINDS = {"16 bit": None, "fp16": get_recipe("fp16"), "int2": get_recipe("int2")}


@pytest.fixture(scope="module")
def demo():
    return load_model("narrowkv://demo", "float32")


def test_a_program_passes_where_its_tests_do():
    assert humaneval.passes(PROBLEM, "\n    return 2 * x")
    assert not humaneval.passes(PROBLEM, "\n    return x")
    assert not humaneval.passes(PROBLEM, "\n    return (")


def test_a_program_has_limits_of_time_and_memory(monkeypatch):
    monkeypatch.setattr(humaneval, "SECONDS", 1)
    assert not humaneval.passes(PROBLEM, "\n    while True: pass")
    assert not humaneval.passes(PROBLEM, "\n    return len(bytearray(2**33)) and 2 * x")


def test_the_interval_of_paired_differences():
    assert tasks.interval([0] * 60) == (0, 0)
    low, high = tasks.interval([-1] * 6 + [1] * 3 + [0] * 51)  # a sum of -3, of standard deviation 2.98
    assert -10 <= low <= -8 and 2 <= high <= 4


@pytest.mark.parametrize(
    ("text", "found"), [("So 4 * 25 = 100.\n#### 1,250.", "1250"), ("#### -3\n#### 4", "-3"), ("It is 12.", None)]
)
def test_the_number_of_an_answer(text, found):
    assert gsm8k.number(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<tool_call>\n{"name": "a", "arguments": {"n": 3}}', ("a", {"n": "3"})),
        ('```json\n{"name": "a", "arguments": {}}\n```', ("a", {})),
        ('{"name": "a", "arguments": {', None),
        ('{"arguments": {}}', None),
        ('{"name": "a", "arguments": "b"}', None),
        ("None of these.", None),
    ],
)
def test_a_call_is_the_first_json_object(text, found):
    assert tool_calls.parsed(text) == found


def test_conversations_end_in_a_request_that_was_not_made_before():
    for turns, (name, arguments) in tool_calls.conversations(8):
        assert turns[-1] == tool_calls.asked(name, arguments)
        assert turns[-1] not in turns[:-1] and [turn["role"] for turn in turns].count("tool") == tool_calls.TURNS - 1


@pytest.mark.parametrize("task", [retrieval, completion])
def test_an_exact_cache_answers_behind_a_long_prompt_as_the_models_own(demo, task, monkeypatch):
    monkeypatch.setattr(retrieval, "read_text", lambda _: "It was a quiet day by the river. " * 50)
    monkeypatch.setattr(completion, "LINES", 6)
    found = task.outcomes(*demo, 512, KINDS)
    assert found["fp16"] == found["16 bit"] and len(found["16 bit"]) == len(found["int2"])
    if task is retrieval:
        assert sum(found["16 bit"]) > sum(found["int2"])


def test_lines_are_completed_in_their_order():
    tokenizer = argparse.Namespace(decode=lambda ids: ["a", "b", ":\n", "\n"][ids[0]])
    following = list(completion.lines(tokenizer, [0, 1, 2, 3, 0, 0, 1, 3, 0]))
    assert following == [[0, 1, 2], [3], [0, 0, 1, 3]]


@torch.inference_mode()
def test_copies_of_a_cache_grow_independently(demo):
    model, _ = demo
    ids = torch.arange(1, 21)[None]
    read = caches.read(model, ids)
    for kind in KINDS.values():
        cache = caches.filled(model, kind, read)
        other = caches.copied(cache)
        model(ids[:, :3], past_key_values=other, use_cache=True)
        assert (cache.get_seq_length(), other.get_seq_length(), read.get_seq_length()) == (20, 23, 20)


def test_a_file_goes_on_where_it_was_interrupted(demo, monkeypatch, tmp_path, capsys):
    model, tokenizer = demo
    subject = Subject("demo", model, tokenizer, {}, {})
    monkeypatch.setattr(tasks, "load", lambda *_, **__: subject)
    monkeypatch.setattr(tasks, "LONG", {"retrieval": lambda *given: {name: [True, False] for name in given[-1]}})
    options = argparse.Namespace(
        out=tmp_path, tasks=["retrieval"], recipes=["int4"], lengths=[256], dtype="float32", peers=False, calibrations=None
    )
    tasks.run("models/demo", options)
    options.recipes = ["int4", "int2"]
    results = tasks.run("models/demo", options)
    assert [row["recipe"] for row in results.rows] == ["16 bit", "int4", "int2"]
    tasks.show(results)
    assert "1 of 2, 0 lost, 0 won, net 0 [0, 0]" in capsys.readouterr().out
