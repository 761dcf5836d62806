"""What the engine works on: a prompt with its answers, and what it says of them as they come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from narrowkv.integrations import PackedCache
from narrowkv.serve.refusals import Refusal
from narrowkv.serve.sampling import Chosen, Sampler, Sampling
from narrowkv.serve.words import Words


@dataclass(frozen=True)
class Delta:
    """What one step adds to one answer. finish: why it ends with this, None where it goes on."""

    choice: int
    text: str
    chosen: Chosen | None = None
    finish: str | None = None


Event = Delta | Refusal


@dataclass(eq=False)
class Job:
    """A prompt, and how many answers of which kind it wants.

    put: is given each event, from the engine's thread; a Refusal is the last. scope: whose prefixes it may use. limit: tokens
    of an answer at most. cancelled: set by whoever no longer wants it. read, reused: tokens of the prompt that were read or
    taken from a prefix, and of these the latter.
    """

    ids: list[int]
    scope: str
    sampling: Sampling
    limit: int
    choices: int = 1
    stops: Sequence[str] = ()
    ignore_eos: bool = False
    skip_special: bool = True
    cancelled: bool = False
    read: int = 0
    reused: int = 0
    passed_over: int = 0
    generated: int = 0
    cache: PackedCache | None = None
    put: Callable[[Event], None] = lambda event: None

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.ids) - self.read


@dataclass(eq=False)
class Answer:
    """One answer under way. last: its newest token, which the cache has not read yet."""

    job: Job
    choice: int
    cache: PackedCache
    sampler: Sampler
    words: Words
    last: int = 0
    tokens: int = 0
    done: bool = False

    def take(self, chosen: Chosen, ends: frozenset[int]) -> None:
        """Take the next token, and tell of it. ends: tokens after which the model has ended."""
        self.last = chosen.token
        self.tokens += 1
        self.job.generated += 1
        ended = chosen.token in ends and not self.job.ignore_eos
        text = self.words.end() if ended else self.words.add(chosen.token)
        finish = "stop" if ended or self.words.stopped else "length" if self.tokens >= self.job.limit else None
        if finish == "length":
            text += self.words.end()
            finish = "stop" if self.words.stopped else finish
        if finish:
            self.done = True
        self.job.put(Delta(self.choice, text, chosen, finish))
