"""How a request is refused: an HTTP status and an error in OpenAI's form, one sentence with cause and remedy."""

from dataclasses import dataclass, field
from typing import Any

from narrowkv.errors import NarrowKVError


@dataclass
class Refusal(NarrowKVError):
    """A request that is not served. status: of HTTP; param: the field at fault; headers: sent along."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def kind(self) -> str:
        """OpenAI's name for such errors."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """A refusal of what a request says."""
    return Refusal(400, message, code, param)
