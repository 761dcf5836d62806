"""The routes."""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from narrowkv.serve.engine import Engine
from narrowkv.serve.exchange import Exchange
from narrowkv.serve.forms import ChatForm, CompletionForm, Form
from narrowkv.serve.gate import Gate, Keys, read_body
from narrowkv.serve.prompts import Prompts
from narrowkv.serve.refusals import Refusal, bad
from narrowkv.serve.replies import NO_STORE, ClientLeftError, Events, refused, while_connected
from narrowkv.serve.sampling import Sampling
from narrowkv.serve.schema import ChatRequest, CompletionRequest, parse
from narrowkv.serve.sequences import Job

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
TOKENIZERS = 2  # threads that read bodies and tokenize


@dataclass(frozen=True)
class Settings:
    """name: of the model, as requests give it. body_bytes, new_tokens: the most of a body, and of an answer. seconds: in which
    a body is to come, and a part of a stream to be taken.
    """

    name: str
    body_bytes: int = 2**20
    new_tokens: int = 4096
    seconds: float = 30.0


class Server:
    """The routes' handlers, over one engine."""

    def __init__(self, engine: Engine, prompts: Prompts, settings: Settings):
        self.engine, self.prompts, self.settings = engine, prompts, settings
        self.pool = ThreadPoolExecutor(TOKENIZERS, thread_name_prefix="narrowkv-tokenizer")
        self.inside = 0  # requests that are being read or answered
        self.most_inside = engine.limits.queue + engine.limits.rows
        self.page = page_headers(PAGE)

    async def show_page(self, request: Request) -> Response:
        """The page for people."""
        return HTMLResponse(PAGE, headers=self.page)

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503, NO_STORE)

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        return PlainTextResponse(self.engine.metrics.text(), headers=NO_STORE, media_type="text/plain; version=0.0.4")

    async def stats(self, request: Request) -> Response:
        """The same as JSON, for the page."""
        cache = self.engine.empty
        facts = {"model": self.settings.name, "recipe": cache.recipe.name, "backend": cache.backend}
        return JSONResponse({**facts, **self.engine.metrics.read()}, headers=NO_STORE)

    def _model(self) -> dict[str, Any]:
        return {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "narrowkv"}

    async def models(self, request: Request) -> Response:
        """The only model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """That model by its name."""
        self._require_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _require_model(self, name: str) -> None:
        if name != self.settings.name:
            sentence = f"The model {name[:200]!r} is not served here; name {self.settings.name!r}."
            raise Refusal(404, sentence, "model_not_found", "model")

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions."""
        return await self._answer(request, self._read_chat)

    async def complete(self, request: Request) -> Response:
        """/v1/completions."""
        return await self._answer(request, self._read_completion)

    async def _answer(self, request: Request, read: Callable[[bytes], "Reading"]) -> Response:
        if self.inside >= self.most_inside:
            self.engine.metrics.add("rejected")
            raise Refusal(429, f"{self.inside} requests are here already; try again later.", headers={"Retry-After": "2"})
        self.inside += 1
        try:
            body = await read_body(request, self.settings.body_bytes, self.settings.seconds)
            loop = asyncio.get_running_loop()
            reading = await loop.run_in_executor(self.pool, read, body)
            exchange = Exchange(self.engine, reading.form, reading.jobs(request.scope["state"]["prefix_scope"]))
            exchange.submit()
        except BaseException:
            self.inside -= 1
            raise

        def leave() -> None:
            exchange.leave()
            self.inside -= 1

        given = reading.given
        if given.stream:
            usage = bool(given.stream_options and given.stream_options.include_usage)
            return Events(exchange.stream(usage), self.settings.seconds, leave)
        try:
            return JSONResponse(await while_connected(request.receive, exchange.whole()), headers=NO_STORE)
        finally:
            leave()

    def _read_chat(self, body: bytes) -> "Reading":
        given: ChatRequest = parse(ChatRequest, body)
        self._require_model(given.model)
        calls = self.prompts.calls if given.tools and given.tool_choice != "none" else None
        ids = [self.prompts.of_chat(given)]
        form = ChatForm(self.prompts.tokenizer, given.model, given.choices, given.top, calls)
        return Reading(
            given, form, ids, self._limit(given, ids), [*given.stops, *self.prompts.stops], skip_special=calls is None
        )

    def _read_completion(self, body: bytes) -> "Reading":
        given: CompletionRequest = parse(CompletionRequest, body)
        self._require_model(given.model)
        if len(given.prompts) > self.most_inside:
            raise bad(f"There are {len(given.prompts)} prompts; send {self.most_inside} at most at a time.", "prompt")
        ids = [self.prompts.of_text(one) if isinstance(one, str) else self.prompts.of_ids(one) for one in given.prompts]
        form = CompletionForm(self.prompts.tokenizer, given.model, given.choices * len(ids), given.top)
        return Reading(given, form, ids, self._limit(given, ids), given.stops)

    def _limit(self, given: Any, prompts: list[list[int]]) -> int:
        """Tokens of an answer at most; raises Refusal for more than there may be."""
        if given.choices > self.engine.limits.rows:
            raise bad(f"'n' is {given.choices}, and {self.engine.limits.rows} answers at most are decoded at a time.", "n")
        if given.stream_options and not given.stream:
            raise bad("'stream_options' needs 'stream': true; set it.", "stream_options")
        longest, positions = max(map(len, prompts)), self.prompts.positions
        most = min(self.settings.new_tokens, positions - longest)
        if (given.most_tokens or 0) > most:
            raise bad(
                f"{given.most_tokens:,} new tokens are more than the {most:,} that there may be after a prompt of {longest:,} "
                "tokens; lower it.",
                "max_tokens",
                "context_length_exceeded" if most < self.settings.new_tokens else None,
            )
        return int(given.most_tokens or most)


@dataclass(frozen=True)
class Reading:
    """What a request says. prompts: token ids; limit: tokens of an answer at most; stops: texts before which it ends."""

    given: Any
    form: Form
    prompts: list[list[int]]
    limit: int
    stops: list[str]
    skip_special: bool = True

    def jobs(self, scope: str) -> list[Job]:
        """A job for each prompt. scope: whose prefixes they may use."""
        given = self.given
        sampling = Sampling(
            temperature=1.0 if given.temperature is None else given.temperature,
            top_p=given.top_p or 1.0,
            top_k=given.top_k or 0,
            seed=given.seed,
            presence_penalty=given.presence_penalty or 0.0,
            frequency_penalty=given.frequency_penalty or 0.0,
            top=given.top,
        )
        return [
            Job(
                ids,
                scope,
                sampling,
                self.limit,
                choices=given.choices,
                stops=self.stops,
                ignore_eos=given.ignore_eos,
                skip_special=self.skip_special,
            )
            for ids in self.prompts
        ]


def make_app(engine: Engine, prompts: Prompts, settings: Settings, keys: Keys, hosts: Sequence[str] = ()) -> Starlette:
    """The application. hosts: names under which it may be called, none: any. Its end stops the engine."""
    server = Server(engine, prompts, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)
        server.pool.shutdown(cancel_futures=True)

    return Starlette(
        routes=[
            Route("/", server.show_page),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
            Route("/stats", server.stats),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.complete, methods=["POST"]),
        ],
        middleware=[Middleware(Gate, keys=keys, hosts=hosts)],
        exception_handlers={
            Refusal: _on_refusal,
            HTTPException: _on_http,
            ClientLeftError: _on_left,
            ClientDisconnect: _on_left,
            Exception: _on_failure,
        },
        lifespan=lifespan,
    )


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    return refused(Refusal(error.status_code, f"{what} is not served ({error.detail}); see /v1/models and the documentation."))


async def _on_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_failure(request: Request, error: Exception) -> Response:
    return refused(Refusal(500, "The server failed; its log has the reason."))


def page_headers(page: str) -> dict[str, str]:
    """Headers under which the page runs its own script and style, and nothing else."""

    def source(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = {
        "default-src": "'none'",
        "script-src": source("script"),
        "style-src": source("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
