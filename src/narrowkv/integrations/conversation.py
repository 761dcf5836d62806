"""A conversation on one packed cache: each turn reads what is new, and the cache keeps what was said."""

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from narrowkv.errors import CacheUseError, TextError, reason
from narrowkv.integrations.cache import PackedCache
from narrowkv.integrations.versions import CACHE

USER, ASSISTANT = "\n\nUser:", "\n\nAssistant:"  # how turns are distinguished where a model has no chat template


class Conversation:
    """Turns of a user and a model, whose tokens are stored in a packed cache.

    messages: what was said so far, as chat templates take it. templated: whether the tokenizer has a chat template; if not,
    turns are joined as plain text. Templates may spell earlier turns anew (without what a model thought, for example): what
    the cache has beyond the common beginning is dropped, or all of it, where a layer cannot go back. read_anew: whether that
    had to be done for the last turn.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: PackedCache, system: str | None = None):
        """system: an instruction that comes first."""
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._first)
        self.read_anew = False
        self._token_ids: list[int] = []  # tokens in the cache

    def reset(self) -> None:
        """Clear the conversation, but not the system prompt."""
        self.messages = list(self._first)
        self._forget()

    def ask(
        self,
        text: str,
        tokens: int,
        show: Callable[[str], None] = lambda words: None,
        stop: Callable[[], bool] = lambda: False,
        **sampling: Any,
    ) -> str:
        """The model's answer of at most this many tokens.

        show: is given the words of the answer as they come. stop: called after each token; True ends the answer. sampling: for
        `generate`, such as do_sample and temperature. Raises TextError, and leaves all as it was, where the template refuses
        the turn or the model has no positions left.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._render(messages)
        left = self._positions() - len(ids)
        if left <= 0:
            raise TextError(
                f"The conversation has {len(ids)} tokens, and the model {self._positions()} positions; begin a new one."
            )
        self._return_to(ids)
        given = torch.tensor([ids], device=self.model.device, dtype=torch.int64)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ends = {} if self.templated else {"stop_strings": [USER], "tokenizer": self.tokenizer}
        try:
            with torch.inference_mode():
                found = self.model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    **{CACHE: self.cache},
                    max_new_tokens=min(tokens, left),
                    pad_token_id=pad,
                    streamer=_Streamer(self.tokenizer, show, None if self.templated else USER),
                    stopping_criteria=[_Asked(stop)],
                    **ends,
                    **sampling,
                )
        except BaseException:
            self._forget()  # the contents are unknown
            raise
        said = found[0].tolist()
        self._token_ids = said[: self.cache.get_seq_length()]
        answer = str(self.tokenizer.decode(said[len(ids) :], skip_special_tokens=True))
        if not self.templated:
            answer = answer.partition(USER)[0].strip()
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.templated:
            names = {"system": "", "user": USER + " ", "assistant": ASSISTANT + " "}
            text = "".join(names[message["role"]] + message["content"] for message in messages) + ASSISTANT
            ids = list(self.tokenizer(text.lstrip("\n"))["input_ids"])
            return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates come with models, and raise what they like
            raise TextError(f"The model's chat template refuses this turn ({reason(error)}).") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written them

    def _positions(self) -> int:
        config = self.model.config.get_text_config(decoder=True)
        return int(getattr(config, "max_position_embeddings", None) or torch.iinfo(torch.int32).max)

    def _return_to(self, ids: list[int]) -> None:
        """Crop the cache to a prefix of these tokens, without the last one, which is to be read."""
        pairs = zip(self._token_ids, ids[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.read_anew = False
        too_many = self.cache.get_seq_length() - common
        if too_many == 0:
            return
        try:
            self.cache.crop(-too_many)
            self._token_ids = self._token_ids[:common]
        except CacheUseError:
            self.read_anew = True
            self._forget()

    def _forget(self) -> None:
        self.cache.reset()
        self._token_ids = []


class _Streamer(TextStreamer):
    """Hands over the words of an answer, without the prompt, until it says `until`."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None], until: str | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.until, self.pending = show, until, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.until is None:
            return self.show(text)
        text, found, _ = (self.pending + text).partition(self.until)
        ready = len(text) if found or stream_end else max(len(text) - len(self.until), 0)  # the rest may begin the end
        self.show(text[:ready])
        self.pending = text[ready:] + found


class _Asked(StoppingCriteria):
    """Leaves off where somebody says so."""

    def __init__(self, stop: Callable[[], bool]):
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.stop(), dtype=torch.bool, device=input_ids.device)
