"""What a request may say. A field that is not listed is refused, never ignored."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from narrowkv.serve.refusals import Refusal, bad

MOST_CHOICES, MOST_STOPS, MOST_STOP_LETTERS, MOST_MESSAGES, MOST_TOOLS, MOST_TOP_LOGPROBS = 8, 4, 256, 4096, 128, 20
ELSEWHERE = {
    "response_format": "JSON modes need decoding under a grammar, which is missing here; describe the JSON in the prompt",
    "logit_bias": "biases of single tokens are not supported; leave it out",
    "tool_choice": "a call cannot be enforced, only left to the model or forbidden; choose 'auto' or 'none'",
    "functions": "functions are an older form of tools; use 'tools'",
    "suffix": "text is not filled in between; leave it out",
    "best_of": "choices are not ranked; use 'n'",
}


class Strict(BaseModel):
    """Fields of the types that they have, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream tells besides text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    """The only form of answers that is offered."""

    type: Literal["text"]


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema, handed to the chat template."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    """A tool, of which there are functions alone."""

    type: Literal["function"]
    function: Function


class CalledFunction(Strict):
    """A call that the model made in an earlier turn; arguments: JSON."""

    name: str
    arguments: str


class Call(Strict):
    """That call, and its id."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """Its content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Request(Strict):
    """What both routes take. user, metadata, store: for the caller's records; nothing is stored here."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    ignore_eos: bool = False
    user: str | None = None

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Texts before which an answer ends; raises Refusal for empty and for long ones."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if any(not 1 <= len(stop) <= MOST_STOP_LETTERS for stop in stops):
            raise bad(f"Texts in 'stop' have 1 to {MOST_STOP_LETTERS} letters; leave empty ones out.", "stop")
        return stops


class ChatRequest(Request):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Tokens of an answer at most, by whichever name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens are named with each token; None without logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise bad("'top_logprobs' needs 'logprobs': true; set it.", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    """A body of /v1/completions. prompt: a text or its token ids, or several of either."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_tokens or 16

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens are named with each token; None without logprobs."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one; raises Refusal where there is none."""
        given: Any = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        found: Any = [given] if given and isinstance(given[0], int) else given
        if not found or not all(found):
            raise bad("The prompt is empty; give at least one token.", "prompt")
        return found


def parse(kind: type[Any], body: bytes) -> Any:
    """A request from the bytes of a body; raises Refusal with a sentence on the first thing that is wrong."""
    try:
        given = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad(f"The body is not valid JSON ({_short(error)}); send one JSON object.") from error
    if not isinstance(given, dict):
        raise bad("The body is JSON, but not an object; send one with 'model' and the other fields.")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explained(error) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _explained(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    name = path[0] if path else None
    where = ".".join(path)[:200]
    if name in ELSEWHERE:
        return bad(f"'{name}' is not supported as given: {ELSEWHERE[name]}.", name, "unsupported_value")
    if first["type"] == "extra_forbidden":
        return bad(f"'{where}' is not supported by this server; leave it out.", name, "unsupported_parameter")
    if first["type"] == "missing":
        return bad(f"'{where}' is missing; add it.", name, "missing_required_parameter")
    return bad(f"'{where}' is not valid ({_short(first['msg'])}); correct it.", name, "invalid_value")


def _short(part: Any) -> str:
    return str(part).splitlines()[0][:200].rstrip(".")
