"""What a body may say; all else is refused in a sentence, never ignored."""

import json

import pytest

from narrowkv.serve.refusals import Refusal
from narrowkv.serve.schema import ChatRequest, CompletionRequest, parse

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "demo", "prompt": "hi"}


def refusal(kind, body):
    with pytest.raises(Refusal) as found:
        parse(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    error = found.value
    assert error.status == 400 and error.body()["error"]["type"] == "invalid_request_error"
    assert error.message.endswith((".", "}")) and "\n" not in error.message and len(error.message) < 600
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("logit_bias", {"5": 1}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", []),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("store", True),
        ("nonsense", 1),
    ],
)
def test_fields_that_are_not_supported(field, value):
    assert refusal(ChatRequest, {**CHAT, field: value}).param == field


@pytest.mark.parametrize(("field", "value"), [("suffix", "x"), ("best_of", 2), ("echo", True), ("messages", [])])
def test_fields_of_completions_that_are_not_supported(field, value):
    assert refusal(CompletionRequest, {**COMPLETION, field: value}).param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", 1e400),
        ("top_p", 0),
        ("n", 0),
        ("n", 9),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("stop", ["a"] * 5),
        ("seed", 2**63),
        ("presence_penalty", 3),
        ("top_logprobs", 21),
        ("messages", []),
        ("messages", [{"role": "wizard", "content": "hi"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", "hi"),
        ("model", None),
        ("stream", "yes"),
    ],
)
def test_values_that_are_not_valid(field, value):
    assert refusal(ChatRequest, {**CHAT, field: value}).param == field or value == 1e400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b"{}", b"null", b'{"a":' * 50_000]
)
def test_bodies_that_are_no_request(body):
    refusal(ChatRequest, body)


def test_stop_texts_and_logprobs_are_checked_together():
    assert parse(ChatRequest, json.dumps({**CHAT, "stop": "a"}).encode()).stops == ["a"]
    for field, value in (("stop", ""), ("stop", ["a" * 257]), ("top_logprobs", 2)):
        given = parse(ChatRequest, json.dumps({**CHAT, field: value}).encode())
        with pytest.raises(Refusal, match=field):
            given.stops, given.top  # noqa: B018


def test_prompts_in_four_forms():
    for prompt, expected in (("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]])):
        assert parse(CompletionRequest, json.dumps({**COMPLETION, "prompt": prompt}).encode()).prompts == expected
    for prompt in ("", [], [""], [[]]):
        given = parse(CompletionRequest, json.dumps({**COMPLETION, "prompt": prompt}).encode())
        with pytest.raises(Refusal, match="empty"):
            given.prompts  # noqa: B018
