"""Before any route: who may come in, from where, and with how much."""

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from narrowkv.serve.refusals import Refusal
from narrowkv.serve.replies import refused

OPEN = ("/", "/health")  # what needs no key


class Keys:
    """The keys that open the server; none: it is open to all. by_key: whether prefixes are those of a key alone."""

    def __init__(self, keys: Sequence[str], by_key: bool = False):
        self.digests = [_digest(key.encode()) for key in keys]
        self.by_key = by_key

    def scope(self, header: str | None) -> str:
        """Whose prefixes a request may use; raises Refusal for a wrong or missing key, in the same time for all of them."""
        given = _digest((header or "").removeprefix("Bearer ").encode("utf-8", "surrogateescape"))
        known = [hmac.compare_digest(given, digest) for digest in self.digests]
        if self.digests and not any(known):
            raise Refusal(
                401, "The API key is wrong or missing; send 'Authorization: Bearer KEY'.", "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return given.hex()[:32] if self.digests and self.by_key else ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(b"narrowkv " + key).digest()


class Gate:
    """ASGI: refuses what no route should see. hosts: names under which the server may be called; none: any."""

    def __init__(self, app: ASGIApp, keys: Keys, hosts: Sequence[str] = ()):
        self.app, self.keys, self.hosts = app, keys, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        try:
            self._require_own_page(request)
            if request.url.path not in OPEN:
                scope.setdefault("state", {})["prefix_scope"] = self.keys.scope(request.headers.get("authorization"))
        except Refusal as refusal:
            return await refused(refusal)(scope, receive, send)
        await self.app(scope, receive, send)

    def _require_own_page(self, request: Request) -> None:
        """Refuse pages of others that a browser here has open: by a name that leads here, or by a form they send."""
        if self.hosts and request.url.hostname not in self.hosts:
            raise Refusal(403, "This server answers under its own name only; call it by the address that it printed.")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            raise Refusal(403, "Pages of other sites may not call this server; call it from a program, or from its own page.")
        if request.method == "POST" and request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise Refusal(415, "The body is not declared as JSON; send 'Content-Type: application/json'.")


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """A body of at most this many bytes, that comes within this time; raises Refusal."""
    too_large = Refusal(413, f"The body has more than {most:,} bytes; send less.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > most:
                raise too_large

    try:
        await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError as error:
        raise Refusal(408, f"The body did not come within {seconds:g} seconds; send it at once.") from error
    return bytes(body)
