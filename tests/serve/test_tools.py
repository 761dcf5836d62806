"""Calls of functions in the forms of three families of templates, whole and broken."""

import json

import pytest

from narrowkv.serve.tools import FORMATS, Calls, format_of

LOOK, GO = '{"name": "look", "arguments": {"at": "sea"}}', '{"name": "go", "arguments": {}}'
HERMES = f"<tool_call>\n{LOOK}\n</tool_call>\n<tool_call>{GO}</tool_call>"
MISTRAL = f"[TOOL_CALLS][{LOOK}, {GO}]"
LLAMA = '{"name": "look", "parameters": {"at": "sea"}}; {"name": "go", "parameters": {}}'
TEXTS = dict(zip(FORMATS, (HERMES, MISTRAL, LLAMA), strict=True))


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("sign", FORMATS)
def test_calls_are_read_however_text_is_cut(sign, size):
    text = "I see. " + TEXTS[sign]
    calls = Calls(format_of(f"a template with tools {sign}"))
    said = "".join(calls.add(text[i : i + size]) for i in range(0, len(text), size))
    rest, made = calls.end()
    assert said == "I see. " and rest == ""
    assert [call["function"]["name"] for call in made] == ["look", "go"]
    assert [json.loads(call["function"]["arguments"]) for call in made] == [{"at": "sea"}, {}]
    assert len({call["id"] for call in made}) == 2 and all(call["type"] == "function" for call in made)


@pytest.mark.parametrize("sign", FORMATS)
@pytest.mark.parametrize("broken", ['{"name": "look", "argu', "[" * 5000, '{"name": 7, "arguments": {}}', "null", "3"])
def test_what_is_no_call_is_text(sign, broken):
    form = FORMATS[sign]
    text = form.marker + broken
    calls = Calls(form)
    assert calls.add(text) == "" and calls.end() == (text, [])


def test_an_answer_without_calls_is_text():
    calls = Calls(FORMATS["<tool_call>"])
    assert calls.add("a < b <tool") + "".join(calls.end()[0]) == "a < b <tool"


def test_templates_without_tools_have_no_form():
    assert format_of(None) is None and format_of("<tool_call>") is None and format_of("tools in another way") is None
