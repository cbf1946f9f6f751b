"""Errors as clients see them: one type with a status, one table from our exceptions to it, one place that writes bodies.

Owns statuses, type names and the two shapes (OpenAI's, and Anthropic's under /v1/messages); it does not know sockets or
routes. Invariants: a client reads only sentences that were written for it (the text of an unknown exception never leaves
the process), of at most MAX_MESSAGE bytes, without memory addresses or paths of this machine; every 401, 503 and 504
carries the header that tells the client what to do.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException

from octavo.errors import CapacityError, EngineDead, OctavoError, RequestError

MAX_MESSAGE = 2000
"""Bytes of a message."""
MAX_ECHO = 200
"""Characters of a client's input that an answer may repeat."""

TYPES = {401: "authentication_error", 500: "server_error", 503: "overloaded_error", 504: "timeout_error"}
ANTHROPIC_TYPES = {
    401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 500: "api_error",
    503: "overloaded_error", 504: "timeout_error",
}
STATUSES = frozenset({400, 401, 404, 405, 413, 415, 500, 503, 504})
HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    503: {"Retry-After": "1"},
    504: {"x-should-retry": "false"},
}
INTERNAL = "The server failed to answer this request; its log says why."

_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{5,}")
_PLACE = re.compile(
    r"(?<![\w.])/(?:bin|data|dev|etc|home|lib|media|mnt|opt|proc|root|run|srv|sys|tmp|usr|var|Users|workspace)/[^\s'\",;)]*")


class ApiError(OctavoError):
    """An answer that is no success.

    Args:
        status: HTTP status, one of STATUSES.
        message: a sentence for the client; it is cut to MAX_MESSAGE bytes and cleared of addresses and paths.
        param: the field at fault. code: machine-readable reason, see serving conventions; None where there is none.
        headers: response headers beside those that the status brings by itself, which they replace.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if status not in STATUSES:
            raise ValueError(f"{status} is not a status that this server sends")
        super().__init__(tidy(message))
        self.status, self.param, self.code = status, None if param is None else clip(param), code
        self.headers = HEADERS.get(status, {}) | dict(headers or {})

    @property
    def message(self) -> str:
        return str(self.args[0])

    @property
    def type(self) -> str:
        """OpenAI's name for this kind of error."""
        return TYPES.get(self.status, "invalid_request_error")

    def document(self, path: str = "") -> dict[str, Any]:
        """The body as an object, also for an event in a stream; its shape depends on the path of the request."""
        if is_anthropic(path):
            kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self, path: str = "") -> bytes:
        """The body of the response."""
        return msgspec.json.encode(self.document(path))

    def raw_headers(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """The response's headers as ASGI wants them."""
        return [
            (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
            *((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()),
        ]


def to_api_error(exc: BaseException) -> ApiError:
    """What a client is told about an exception; everything that is not made for clients becomes a 500 with a fixed message."""
    match exc:
        case ApiError():
            return exc
        case RequestError():
            return ApiError(400, str(exc), param=exc.param, code=exc.code)
        case CapacityError():
            return ApiError(503, str(exc), headers=retry_after(exc.retry_after))
        case EngineDead():
            return ApiError(503, "The engine is being restarted.")
        case TimeoutError():
            return ApiError(504, "The request was not done within its time limit.")
        case HTTPException(status_code=404):
            return ApiError(404, "There is no such route.", code="unknown_route")
        case HTTPException(status_code=405):
            return ApiError(405, "This route does not know the method.", headers=exc.headers)
        case HTTPException(status_code=status) if status < 500:
            return ApiError(400, str(exc.detail))
    return ApiError(500, INTERNAL)


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again, in whole seconds, at least 1."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def is_anthropic(path: str) -> bool:
    """Whether a path is one of Anthropic's API, and its errors take that shape."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def clip(text: str, limit: int = MAX_ECHO) -> str:
    """A client's text as an answer may repeat it: at most ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def tidy(message: str) -> str:
    """A message fit to be sent: valid Unicode, no address, no path of this machine, at most MAX_MESSAGE bytes."""
    message = _PLACE.sub("(path)", _ADDRESS.sub("(address)", message)) or "The request failed."
    data = message.encode("utf-8", "replace")
    if len(data) > MAX_MESSAGE:
        data = data[: MAX_MESSAGE - 3] + b"..."
    return data.decode("utf-8", "ignore")
