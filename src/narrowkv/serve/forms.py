"""Answers in OpenAI's form, whole and in chunks, of chats and of completions."""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from narrowkv.serve.sampling import Chosen
from narrowkv.serve.sequences import Delta, Job
from narrowkv.serve.tools import CallFormat, Calls


def usage(jobs: list[Job]) -> dict[str, Any]:
    """How many tokens were read and generated."""
    prompt, generated = sum(len(job.ids) for job in jobs), sum(job.generated for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(job.reused for job in jobs)},
    }


@dataclass
class Choice:
    """One answer so far. calls: parts it into text and calls, where the model was given tools."""

    calls: Calls | None = None
    text: str = ""
    made: list[dict[str, Any]] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    finish: str | None = None

    def add(self, delta: Delta) -> str:
        """Take what one step adds; returns the part of it that is text."""
        text = self.calls.add(delta.text) if self.calls else delta.text
        if delta.finish and self.calls:
            rest, self.made = self.calls.end()
            text += rest
        if delta.chosen:
            self.chosen.append(delta.chosen)
        self.text += text
        self.finish = "tool_calls" if delta.finish and self.made else delta.finish
        return text


class Form:
    """How answers of a route are put. model: the name that is given; top: whether logprobs are wanted."""

    prefix, kind, part_kind = "", "", ""

    def __init__(self, tokenizer: Any, model: str, choices: int, top: int | None, calls: CallFormat | None = None):
        self.tokenizer, self.top = tokenizer, top
        self.choices = [Choice(Calls(calls) if calls else None) for _ in range(choices)]
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def whole(self, jobs: list[Job]) -> dict[str, Any]:
        """The answer of a plain request."""
        choices = [self._choice(i, choice) for i, choice in enumerate(self.choices)]
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage(jobs)}

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """What a stream says of one step."""
        choice = self.choices[delta.choice]
        text = choice.add(delta)
        for part in self._parts(choice, text, delta):
            yield self._chunk([{"index": delta.choice, **part}])

    def first(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        return iter(())

    def last(self, jobs: list[Job]) -> dict[str, Any]:
        """What a stream that was to tell its usage ends with."""
        return {**self._chunk([]), "usage": usage(jobs)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.part_kind, "choices": choices}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _parts(self, choice: Choice, text: str, delta: Delta) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def token(self, token: int) -> str:
        """The text of one token."""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class ChatForm(Form):
    """Of /v1/chat/completions."""

    prefix, kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> Iterator[dict[str, Any]]:
        """The role of each answer."""
        delta = {"role": "assistant", "content": ""}
        for index in range(len(self.choices)):
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.made:
            message |= {"content": choice.text or None, "tool_calls": choice.made}
        return {"index": index, "message": message, "logprobs": self._logprobs(choice.chosen), "finish_reason": choice.finish}

    def _parts(self, choice: Choice, text: str, delta: Delta) -> Iterator[dict[str, Any]]:
        logprobs = self._logprobs([delta.chosen] if delta.chosen else [])
        if text or self.top is not None:
            yield {"delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}
        if delta.finish and choice.made:
            calls = [{"index": i, **call} for i, call in enumerate(choice.made)]
            yield {"delta": {"tool_calls": calls}, "logprobs": None, "finish_reason": None}
        if delta.finish:
            yield {"delta": {}, "logprobs": None, "finish_reason": choice.finish}

    def _logprobs(self, chosen: list[Chosen]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        return {"content": [self._named(one) for one in chosen], "refusal": None}

    def _named(self, chosen: Chosen) -> dict[str, Any]:
        top = [self._one(token, logprob) for token, logprob in chosen.top]
        return {**self._one(chosen.token, chosen.logprob or 0.0), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionForm(Form):
    """Of /v1/completions."""

    prefix, kind, part_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.chosen, 0),
            "finish_reason": choice.finish,
        }

    def _parts(self, choice: Choice, text: str, delta: Delta) -> Iterator[dict[str, Any]]:
        chosen = [delta.chosen] if delta.chosen else []
        offset = len(choice.text) - len(text)
        if text or delta.finish or self.top is not None:
            yield {"text": text, "logprobs": self._logprobs(chosen, offset), "finish_reason": choice.finish}

    def _logprobs(self, chosen: list[Chosen], offset: int) -> dict[str, Any] | None:
        if self.top is None:
            return None
        tokens = [self.token(one.token) for one in chosen]
        offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": [{self.token(token): logprob for token, logprob in one.top} for one in chosen],
            "text_offset": offsets,
        }
