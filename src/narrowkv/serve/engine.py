"""The engine: one thread that reads prompts in chunks and decodes all answers under way as rows of one pass."""

import copy
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowkv.errors import NarrowKVError, UnsupportedModelError, reason
from narrowkv.integrations import CacheGroup, PackedCache
from narrowkv.integrations.versions import CACHE
from narrowkv.serve.metrics import Metrics
from narrowkv.serve.prefixes import Prefixes
from narrowkv.serve.refusals import Refusal
from narrowkv.serve.sampling import Sampler
from narrowkv.serve.sequences import Answer, Job
from narrowkv.serve.words import Words

LOG = logging.getLogger("narrowkv.serve")
PATIENCE = 4  # chunks of shorter prompts that go before one that came earlier
MEASURED_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Limits:
    """rows: answers decoded at a time. chunk: tokens of a prompt read between two steps, a multiple of 64. queue: requests
    that may wait. cache_bytes: of stored prefixes.
    """

    rows: int = 8
    chunk: int = 128
    queue: int = 64
    cache_bytes: int = 2**30


class Engine:
    """Answers jobs on a thread of its own, from `start` to `stop`.

    source: a Calibration or recipe; options: of PackedCache. folder: where prefixes stay over a restart.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        source: Any,
        limits: Limits,
        folder: Path | None = None,
        **options: Any,
    ):
        self.model, self.tokenizer, self.limits, self.folder = model, tokenizer, limits, folder
        self.empty = PackedCache(model, source, **options)
        self.metrics = Metrics()
        self.prefixes = Prefixes(limits.cache_bytes, limits.chunk)
        if folder is not None:
            self.prefixes.load(folder, model, source, **options)
        self.ends = _ends(model, tokenizer)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._change = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._running: list[Answer] = []
        self._stopping: float | None = None  # until when what runs may finish
        self._current: Job | None = None  # whose prompt was read last
        self._one_by_one = False  # where rows of this model cannot go together
        self._measured = 0.0
        self._thread = threading.Thread(target=self._run, name="narrowkv-engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; raises Refusal where the queue is full, or the server stops."""
        with self._change:
            if self._stopping is not None:
                raise Refusal(503, "The server is stopping; try another one.", headers={"Retry-After": "30"})
            if len(self._waiting) >= self.limits.queue:
                self.metrics.add("rejected")
                raise Refusal(
                    429, f"{len(self._waiting)} requests wait already; try again later.", headers={"Retry-After": "2"}
                )
            self._waiting.append(job)
            self.metrics.add("requests")
            self._change.notify()

    def wake(self) -> None:
        """Look at once whether jobs were cancelled."""
        with self._change:
            self._change.notify()

    def stop(self, seconds: float = 0.0) -> None:
        """Take no more jobs, give those under way this long, then end the thread; prefixes are saved."""
        with self._change:
            self._stopping = time.monotonic() + seconds
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are answered."""
        return self._thread.is_alive()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                self.step()
            self._fail([*self._waiting, *self._reading, *(answer.job for answer in self._running)], _stopped())
            if self.folder is not None:
                self._save()

    def step(self) -> None:
        """Read a chunk of a prompt, and decode a token of each answer under way; called by the thread, or instead of it."""
        self._drop_cancelled()
        self._admit()
        self._guarded(self._read_chunk, lambda: [job for job in [self._current] if job])
        self._guarded(self._decode, lambda: [answer.job for answer in self._running])
        self._measure()

    def _save(self) -> None:
        assert self.folder is not None
        try:
            self.prefixes.save(self.folder)
        except NarrowKVError as error:
            LOG.warning("Prefixes were not saved: %s", error)

    def _wait(self) -> bool:
        """Wait for something to do; False where the thread is to end."""
        with self._change:
            while not (self._waiting or self._reading or self._running) and self._stopping is None:
                self._measure()
                self._change.wait(MEASURED_EVERY)
            if self._stopping is None:
                return True
            return bool(self._waiting or self._reading or self._running) and time.monotonic() < self._stopping

    def _drop_cancelled(self) -> None:
        with self._change:
            gone = [job for job in self._waiting if job.cancelled]
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for job in [job for job in self._reading if job.cancelled]:
            self._reading.remove(job)
            gone.append(job)
            if job.cache is not None and job.read % self.limits.chunk == 0:  # what was read may serve the next request
                self.prefixes.add(job.ids[: job.read], job.scope, job.cache)
        gone += {id(answer.job): answer.job for answer in self._running if answer.job.cancelled}.values()
        self._running = [answer for answer in self._running if not answer.job.cancelled]
        self.metrics.add("cancelled", len(gone))

    def _admit(self) -> None:
        """Let the jobs that came first begin, while there are rows for their answers."""
        with self._change:
            used = len(self._running) + sum(job.choices for job in self._reading)
            while self._waiting and used + self._waiting[0].choices <= self.limits.rows:
                job = self._waiting.popleft()
                used += job.choices
                self._reading.append(job)

    def _next_to_read(self) -> Job:
        """The prompt that is nearest to its end, unless the oldest was passed over long enough.

        One whose beginning another is reading waits for that.
        """
        ready = [job for job in self._reading if not any(self._shared(job, other) > other.read for other in self._reading)]
        oldest = ready[0]
        chosen = oldest if oldest.passed_over >= PATIENCE else min(ready, key=lambda job: job.unread)
        oldest.passed_over = 0 if chosen is oldest else oldest.passed_over + 1
        return chosen

    def _shared(self, job: Job, other: Job) -> int:
        """How many tokens a prompt that has not begun may take from one that has."""
        if job.cache is not None or other.cache is None or job.scope != other.scope or not self.prefixes.budget:
            return 0
        return self.prefixes.shared(job.ids, other.ids)

    def _read_chunk(self) -> None:
        if not self._reading:
            return
        job, chunk = self._next_to_read(), self.limits.chunk
        self._current = job
        if job.cache is None:
            found = self.prefixes.find(job.ids, job.scope)
            job.cache, job.read = found or (copy.deepcopy(self.empty), 0)
            job.reused = job.read
            self.metrics.add("reused_tokens", job.reused)
        stop = min((job.read // chunk + 1) * chunk, len(job.ids))
        logits = self._logits([job.ids[job.read : stop]], job.cache, **self._last_only)
        job.read = stop
        self.metrics.add("chunks")
        wanted = any(self._shared(other, job) == stop for other in self._reading)
        if wanted or stop == self.prefixes.usable(len(job.ids)):
            self.prefixes.add(job.ids[:stop], job.scope, job.cache)
        if not job.unread:
            self._reading.remove(job)
            self.metrics.add("prompt_tokens", len(job.ids))
            self._begin_answers(job, logits[0])

    def _begin_answers(self, job: Job, logits: Tensor) -> None:
        assert job.cache is not None
        caches = [job.cache, *(copy.deepcopy(job.cache) for _ in range(job.choices - 1))]
        job.cache = None
        for choice, cache in enumerate(caches):
            words = Words(self.tokenizer, job.stops, job.skip_special)
            self._take(Answer(job, choice, cache, Sampler(job.sampling, choice), words), logits)

    def _take(self, answer: Answer, logits: Tensor) -> None:
        chosen = answer.sampler.choose(logits)
        self.metrics.add("generated_tokens")
        answer.take(chosen, self.ends)
        if not answer.done and answer not in self._running:
            self._running.append(answer)

    def _decode(self) -> None:
        if not self._running:
            return
        answers = list(self._running)
        logits = self._decoded(answers)
        self.metrics.add("steps")
        for answer, row in zip(answers, logits, strict=True):
            self._take(answer, row)
        self._running = [answer for answer in self._running if not answer.done]

    def _decoded(self, answers: list[Answer]) -> list[Tensor]:
        """Logits [vocabulary] of the next token of each answer."""
        if len(answers) > 1 and not self._one_by_one:
            group = CacheGroup([answer.cache for answer in answers])
            try:
                return list(self._logits([[answer.last] for answer in answers], group))
            except UnsupportedModelError as error:
                LOG.warning("Answers are decoded one by one: %s", error)
                self._one_by_one = True
        return [self._logits([[answer.last]], answer.cache)[0] for answer in answers]

    def _logits(self, ids: list[list[int]], cache: Any, **options: Any) -> Tensor:
        """Logits after the last of these tokens, [rows, vocabulary]."""
        tokens = torch.tensor(ids, dtype=torch.int64, device=self.model.device)
        output = self.model(input_ids=tokens, **{CACHE: cache}, use_cache=True, **options)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _guarded(self, work: Callable[[], None], jobs: Callable[[], list[Job]]) -> None:
        """Do some work; where it fails, so do the jobs that it is about, and the engine goes on."""
        try:
            work()
        except Exception as error:  # whatever models raise
            LOG.exception("A step failed")
            self._fail(jobs(), Refusal(500, f"The server failed while it computed ({reason(error)}); try again."))

    def _fail(self, jobs: list[Job], refusal: Refusal) -> None:
        failed = {id(job): job for job in jobs}
        self._reading = [job for job in self._reading if id(job) not in failed]
        self._running = [answer for answer in self._running if id(answer.job) not in failed]
        self.metrics.add("failed", len(failed))
        for job in failed.values():
            job.put(refusal)

    def _measure(self) -> None:
        now = time.monotonic()
        self.metrics.set(running=len(self._running), reading=len(self._reading), waiting=len(self._waiting))
        if now < self._measured + MEASURED_EVERY:
            return
        self._measured = now
        caches = [answer.cache for answer in self._running] + [job.cache for job in self._reading if job.cache is not None]
        longest = max(caches, key=lambda cache: cache.length, default=None)
        if longest is not None and longest.length:
            self.metrics.set(bits_per_element=longest.bits_per_element)
        self.metrics.set(
            running_bytes=sum(cache.nbytes for cache in caches),
            prefixes=len(self.prefixes.stored),
            prefix_bytes=self.prefixes.nbytes,
        )


def _stopped() -> Refusal:
    return Refusal(503, "The server stopped before the answer was finished; try another one.", headers={"Retry-After": "30"})


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens after which an answer has ended."""
    config = getattr(model, "generation_config", None)
    given = [getattr(config, "eos_token_id", None), tokenizer.eos_token_id]
    found = [token for one in given if one is not None for token in (one if isinstance(one, list) else [one])]
    return frozenset(int(token) for token in found)
