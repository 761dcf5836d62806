"""From tokens to text as they come: letters of several tokens are whole, and nothing is shown that may begin a stop text."""

from collections.abc import Sequence
from typing import Any

LOOK_BACK = 6  # tokens decoded again, so that joints between tokens come out as in the whole text
BROKEN = "\N{REPLACEMENT CHARACTER}"  # for the first bytes of a letter


class Words:
    """The text of one answer.

    stops: texts before which it ends. stopped: whether it has met one; nothing is shown after that.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), skip_special: bool = True):
        self.tokenizer, self.stops, self.skip_special = tokenizer, list(stops), skip_special
        self.stopped = False
        self._tokens: list[int] = []
        self._shown = 0  # tokens whose text was given
        self._pending = ""  # text that may begin a stop text

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=self.skip_special, clean_up_tokenization_spaces=False))

    def _around(self) -> tuple[str, str]:
        """The text of the last tokens that were shown, and of these with all that came since."""
        recent = self._tokens[max(self._shown - LOOK_BACK, 0) :]
        return self._decode(recent[: min(self._shown, LOOK_BACK)]), self._decode(recent)

    def add(self, token: int) -> str:
        """The text that is certain with one more token."""
        self._tokens.append(token)
        before, after = self._around()
        if after.endswith(BROKEN) and len(self._tokens) - self._shown < LOOK_BACK:
            return ""
        self._shown = len(self._tokens)
        return self._until_stop(after[len(before) :])

    def end(self) -> str:
        """What was still withheld."""
        before, after = self._around()
        self._shown = len(self._tokens)
        text = self._until_stop(after[len(before) :])
        text, self._pending = text + self._pending, ""
        return text

    def _until_stop(self, text: str) -> str:
        """The part of new text that is before every stop text, and begins none."""
        if self.stopped:
            return ""
        text = self._pending + text
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._pending = True, ""
            return text[: min(found)]
        ready = len(text) - max((beginning(text, stop) for stop in self.stops), default=0)
        self._pending = text[ready:]
        return text[:ready]


def beginning(text: str, stop: str) -> int:
    """How many letters at the end of a text begin another one."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
