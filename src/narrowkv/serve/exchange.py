"""Between the event loop and the engine's thread: the jobs of one request, and what comes of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

from narrowkv.serve.engine import Engine
from narrowkv.serve.forms import Form
from narrowkv.serve.refusals import Refusal
from narrowkv.serve.sequences import Delta, Event, Job


class Exchange:
    """One request. Its answers are those of its jobs, in order; made on the event loop that waits for them."""

    def __init__(self, engine: Engine, form: Form, jobs: list[Job]):
        self.engine, self.form, self.jobs = engine, form, jobs
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        for i, job in enumerate(jobs):
            job.put = partial(self._put, i * job.choices)

    def _put(self, offset: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, (offset, event))

    def submit(self) -> None:
        """Queue all jobs, or none; raises Refusal."""
        try:
            for job in self.jobs:
                self.engine.submit(job)
        except Refusal:
            self.leave()
            raise

    def leave(self) -> None:
        """Nobody waits any longer: what still runs is cancelled."""
        for job in self.jobs:
            job.cancelled = True
        self.engine.wake()

    async def deltas(self) -> AsyncIterator[Delta]:
        """What comes, until all answers are finished; raises Refusal where one fails."""
        left = len(self.form.choices)
        while left:
            offset, event = await self._events.get()
            if isinstance(event, Refusal):
                raise event
            left -= event.finish is not None
            yield replace(event, choice=event.choice + offset)

    async def whole(self) -> dict[str, Any]:
        """All answers at once."""
        async for delta in self.deltas():
            self.form.choices[delta.choice].add(delta)
        return self.form.whole(self.jobs)

    async def stream(self, usage: bool) -> AsyncIterator[dict[str, Any]]:
        """Answers as they come. usage: whether to tell at the end what they took."""
        none = {"usage": None} if usage else {}
        for chunk in self.form.first():
            yield chunk | none
        async for delta in self.deltas():
            for chunk in self.form.chunks(delta):
                yield chunk | none
        if usage:
            yield self.form.last(self.jobs)
