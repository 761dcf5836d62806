"""The listening process: connections that are bounded in number and in time, and a graceful end."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from narrowkv.errors import OutputError

MOST_CONNECTIONS = 512
MOST_HEADER_BYTES = 2**15
SEND_BUFFER = 2**17  # bytes that a client may leave untaken before it is waited for
HEADER_SECONDS = 10.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Address:
    """Where to listen. seconds: that answers under way are given when the server is to stop."""

    host: str = "127.0.0.1"
    port: int = 8000
    seconds: int = 30


class BoundedProtocol(H11Protocol):
    """HTTP/1.1: MOST_CONNECTIONS at most, each of which says what it wants within some seconds."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            return transport.abort()
        self._expect_header()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def _expect_header(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        """Close the connection, unless a request is being answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class Listening:
    """A socket that listens already, so that an address in use is noticed before a model is loaded."""

    def __init__(self, bound: socket.socket, address: Address):
        self.bound, self.address = bound, address

    @property
    def url(self) -> str:
        """Where to find the page."""
        host, port = self.bound.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def serve(self, app: ASGIApp) -> None:
        """Answer requests until a signal ends it."""
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(HEADER_SECONDS),
            timeout_graceful_shutdown=self.address.seconds,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        )
        before = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            uvicorn.Server(config).run(sockets=[self.bound])  # raises the signal again that has ended it
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ignore(*signal_and_frame: object) -> None:
    """The end was graceful."""


@contextlib.contextmanager
def listen(address: Address) -> Iterator[Listening]:
    """Within, a socket is bound to an address; raises OutputError where that cannot be."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        try:
            bound.bind((address.host, address.port))
        except OSError as error:
            where = f"{address.host} port {address.port}"
            raise OutputError(f"Cannot listen on {where}: {error.strerror or error}; choose another --port.") from error
        yield Listening(bound, address)


def hosts_of(host: str) -> Sequence[str]:
    """Names under which a server on this address may be called; none, any, where others than this machine reach it."""
    return LOOPBACK if host in LOOPBACK else ()
