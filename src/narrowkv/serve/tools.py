"""Calls of functions in a model's answer: where they begin, and what they say, in the forms of three families of templates."""

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from narrowkv.serve.words import beginning

MOST_CALLS = 64


@dataclass(frozen=True)
class CallFormat:
    """How a family of models writes calls. marker: with which they begin. read: the calls of a text from the marker on."""

    marker: str
    read: Callable[[str], list[dict[str, Any]]]


def _hermes(text: str) -> list[dict[str, Any]]:
    """<tool_call>{"name": ..., "arguments": ...}</tool_call>, several in a row (Qwen, Hermes, SmolLM3)."""
    return [json.loads(part) for part in re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", text, flags=re.S)]


def _mistral(text: str) -> list[dict[str, Any]]:
    """[TOOL_CALLS][{"name": ..., "arguments": ...}, ...]."""
    found: list[dict[str, Any]] = json.loads(text.removeprefix("[TOOL_CALLS]"))
    return found


def _llama(text: str) -> list[dict[str, Any]]:
    """{"name": ..., "parameters": ...}, several separated by semicolons (Llama 3)."""
    decoder, text = json.JSONDecoder(), text.removeprefix("<|python_tag|>").strip()
    found: list[dict[str, Any]] = []
    while text and len(found) < MOST_CALLS:
        call, end = decoder.raw_decode(text)
        found.append(call)
        text = text[end:].lstrip("; \n")
    return found


FORMATS = {
    "<tool_call>": CallFormat("<tool_call>", _hermes),
    "[TOOL_CALLS]": CallFormat("[TOOL_CALLS]", _mistral),
    '"parameters": ': CallFormat('{"name"', _llama),
}


def format_of(template: str | None) -> CallFormat | None:
    """The form of calls of models with this chat template; None where it takes no tools, or writes them otherwise."""
    if not template or "tools" not in template:
        return None
    return next((found for sign, found in FORMATS.items() if sign in template), None)


class Calls:
    """Parts an answer into text and calls, as it comes."""

    def __init__(self, form: CallFormat):
        self.form = form
        self._withheld = ""
        self._begun = False

    def add(self, text: str) -> str:
        """The part of new text that belongs to no call."""
        self._withheld += text
        if self._begun:
            return ""
        before, marker, _ = self._withheld.partition(self.form.marker)
        self._begun = bool(marker)
        ready = len(before) if marker else len(before) - beginning(before, self.form.marker)
        self._withheld = self._withheld[ready:]
        return before[:ready]

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest: text, where no call can be read of it, or calls in OpenAI's form."""
        if not self._begun:
            return self._withheld, []
        try:
            return "", [_call(found) for found in self.form.read(self._withheld)[:MOST_CALLS]]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return self._withheld, []


def _call(found: dict[str, Any]) -> dict[str, Any]:
    arguments = found.get("arguments", found.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = found["name"]
    if not isinstance(name, str):
        raise TypeError("a function's name is a text")
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": text}}
