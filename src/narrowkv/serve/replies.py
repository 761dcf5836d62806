"""How answers are sent: at once, or as server-sent events to a client that may leave at any time."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from narrowkv.serve.refusals import Refusal

Found = TypeVar("Found")
NO_STORE = {"Cache-Control": "no-store"}


def refused(refusal: Refusal) -> JSONResponse:
    """A refusal as an answer."""
    headers = {**NO_STORE, **refusal.headers}
    if refusal.status in (408, 413):  # what is left of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(refusal.body(), refusal.status, headers)


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Receive, work: Awaitable[Found]) -> Found:
    """What some work gives; it is cancelled, and ClientLeftError raised, where the client leaves before."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        for future in (task, left):
            future.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await future


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Server-sent events of JSON, and [DONE]. seconds: for which a client may take nothing. left: called at the end."""

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncIterator[dict[str, Any]], seconds: float, left: Callable[[], None]):
        super().__init__(headers={**NO_STORE, "X-Accel-Buffering": "no"}, media_type=self.media_type)
        del self.headers["content-length"]
        self.parts, self.seconds, self.left = parts, seconds, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        except (ClientLeftError, asyncio.TimeoutError, OSError):
            pass
        finally:
            self.left()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for part in self.parts:
                await self._send(send, json.dumps(part, ensure_ascii=False))
        except Refusal as refusal:
            await self._send(send, json.dumps(refusal.body()))
        else:
            await self._send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: str) -> None:
        body = f"data: {data}\n\n".encode()
        await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": True}), self.seconds)
