"""From messages or text to token ids, within the model's positions: done by threads, off the event loop."""

import json
from typing import Any

import torch

from narrowkv.errors import reason
from narrowkv.integrations.conversation import ASSISTANT, USER
from narrowkv.serve.refusals import bad
from narrowkv.serve.schema import ChatRequest, Message
from narrowkv.serve.tools import CallFormat, format_of


class Prompts:
    """Prompts of one model.

    most_tokens: of a prompt. calls: how the model writes calls, None where it takes no tools. stops: texts before which every
    answer in a chat ends: of models without a chat template, whose turns are joined as plain text.
    """

    def __init__(self, model: Any, tokenizer: Any, most_tokens: int | None = None):
        config = model.config.get_text_config(decoder=True)
        self.tokenizer = tokenizer
        self.positions = int(getattr(config, "max_position_embeddings", None) or torch.iinfo(torch.int32).max)
        self.most_tokens = min(most_tokens or self.positions - 1, self.positions - 1)
        self.vocabulary = len(model.get_input_embeddings().weight)
        self.template = getattr(tokenizer, "chat_template", None)
        if isinstance(self.template, dict):
            self.template = self.template.get("default")
        self.calls: CallFormat | None = format_of(self.template)
        self.stops = [] if self.template else [USER]
        self._longest = max(map(len, tokenizer.get_vocab()))  # letters of a token

    def of_chat(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation; raises Refusal where the template does not take it."""
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        if tools and self.calls is None:
            raise bad("This model's chat template has no form of calls that is known here; leave 'tools' out.", "tools")
        messages = [_plain(message) for message in request.messages]
        if self.template is None:
            return self.of_text(_joined(messages))
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools if tools and request.tool_choice != "none" else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # templates come with models, and raise what they like
            raise bad(f"The model's chat template refuses these messages ({reason(error)}).", "messages") from error
        return self._encode(text, add_special_tokens=False)  # the template has written them

    def of_text(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids = self._encode(text, add_special_tokens=True)
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def of_ids(self, ids: list[int]) -> list[int]:
        """Token ids as they were given; raises Refusal beyond the vocabulary, or for more than there are positions."""
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise bad(f"Token ids are from 0 to {self.vocabulary - 1:,} for this model; use its own tokenizer.", "prompt")
        return self._fitting(ids)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise bad("The text has half of a surrogate pair, which is no letter; send valid Unicode.") from error
        if len(text) > self.most_tokens * self._longest:
            raise self._too_long(f"{len(text):,} letters")
        return self._fitting(list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]))

    def _fitting(self, ids: list[int]) -> list[int]:
        if not ids:
            raise bad("The prompt is empty; give at least one token.")
        if len(ids) > self.most_tokens:
            raise self._too_long(f"{len(ids):,} tokens")
        return ids

    def _too_long(self, size: str) -> Exception:
        return bad(
            f"The prompt has {size}, and this server takes {self.most_tokens:,} tokens at most; shorten it.",
            code="context_length_exceeded",
        )


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates take it: arguments of calls as data, not as text."""
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text}
    if message.name:
        found["name"] = message.name
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _data(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _data(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _joined(messages: list[dict[str, Any]]) -> str:
    """Turns as plain text, for models without a chat template."""
    names = {"system": "", "user": USER + " ", "assistant": ASSISTANT + " "}
    if any(message["role"] not in names for message in messages):
        raise bad("This model has no chat template, so no message of a tool can be read; leave it out.", "messages")
    return "".join(names[message["role"]] + message["content"] for message in messages).lstrip("\n") + ASSISTANT
