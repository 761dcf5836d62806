"""Calls of tools as JSON, in the last of several turns, through the model's chat template."""

import itertools
import json
import random
from typing import Any

from benchmarks.tasks.caches import Kind
from benchmarks.tasks.generated import completions

NAME = "tool calls"
COUNT, TURNS, NEW_TOKENS = 30, 3, 80
STOPS = ("</tool_call>", "\n```\n", "<|im_end|>")
# of each tool: its description, its parameters, how it is asked for, and what they may be
TOOLS: dict[str, tuple[str, str, dict[str, tuple[str, ...]]]] = {
    "get_weather": (
        "Get the current weather of a city",
        "What is the weather in {city}, in {unit}?",
        {"city": ("Lisbon", "Oslo", "Nairobi", "Quito"), "unit": ("celsius", "fahrenheit")},
    ),
    "set_alarm": (
        "Set an alarm at a time of day",
        "Set an alarm for {time} with the label {label}.",
        {"time": ("06:15", "07:40", "18:05", "22:30"), "label": ("gym", "train", "dinner")},
    ),
    "convert_currency": (
        "Convert an amount from one currency into another",
        "How much are {amount} {source} in {target}?",
        {"amount": ("125", "980", "43"), "source": ("EUR", "JPY"), "target": ("USD", "CHF")},
    ),
    "search_flights": (
        "Search flights between two airports on a date",
        "Find flights from {origin} to {destination} on {date}.",
        {"origin": ("LIS", "OSL"), "destination": ("NBO", "UIO"), "date": ("2025-03-14", "2025-08-02", "2025-11-30")},
    ),
    "send_message": (
        "Send a short message to a contact",
        "Send {contact} the message: {text}",
        {"contact": ("Imogen", "Rupert"), "text": ("I am late", "see you at noon", "the keys are with Tobias")},
    ),
    "create_file": (
        "Create a file with a content",
        "Create the file {path} with the content {content}",
        {"path": ("notes/today.md", "src/main.py"), "content": ("hello world", "print(42)", "buy bread")},
    ),
}

Call = tuple[str, dict[str, str]]


def schemas() -> list[dict[str, Any]]:
    """The tools as chat templates take them."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": {
                    "type": "object",
                    "properties": {parameter: {"type": "string"} for parameter in choices},
                    "required": list(choices),
                },
            },
        }
        for name, (description, _, choices) in TOOLS.items()
    ]


def asked(name: str, arguments: dict[str, str]) -> dict[str, Any]:
    """What a user says for a call."""
    return {"role": "user", "content": TOOLS[name][1].format(**arguments)}


def answered(call: Call) -> list[dict[str, Any]]:
    """A call that was made and its result, as turns."""
    name, arguments = call
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        asked(name, arguments),
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "name": name, "content": json.dumps({"status": "ok"})},
        {"role": "assistant", "content": "Done."},
    ]


def conversations(count: int) -> list[tuple[list[dict[str, Any]], Call]]:
    """Turns whose last asks for a call, and that call; no conversation makes it twice."""
    calls = [
        (name, dict(zip(choices, values, strict=True)))
        for name, (_, _, choices) in TOOLS.items()
        for values in itertools.product(*choices.values())
    ]
    rng = random.Random(0)
    found = []
    for _ in range(count):
        *before, call = rng.sample(calls, TURNS)
        found.append(([turn for made in before for turn in answered(made)] + [asked(*call)], call))
    return found


def parsed(text: str) -> Call | None:
    """The first JSON object of a reply as a call; None where it is none."""
    try:
        found: Any = json.JSONDecoder().raw_decode(text[text.find("{") :])[0]
        return found["name"], {name: str(value) for name, value in found["arguments"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def replies(model: Any, tokenizer: Any, kind: Kind, count: int = COUNT) -> tuple[list[bool], list[bool]]:
    """Of each conversation: whether the call is right, and whether it is valid JSON."""
    rows = conversations(count)
    prompts = [
        tokenizer.apply_chat_template(turns, tools=schemas(), add_generation_prompt=True, tokenize=False) for turns, _ in rows
    ]
    calls = [parsed(text) for text in completions(model, tokenizer, prompts, kind, NEW_TOKENS, STOPS)]
    right = [call == expected for call, (_, expected) in zip(calls, rows, strict=True)]
    return right, [call is not None for call in calls]
