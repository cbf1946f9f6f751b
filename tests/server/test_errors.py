"""What clients are told: statuses, types, shapes, and what never leaves the process."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from octavo.errors import CapacityError, ConfigError, EngineDead, RequestError
from octavo.server.errors import INTERNAL, MAX_MESSAGE, STATUSES, ApiError, clip, retry_after, to_api_error

KINDS = {
    400: ("invalid_request_error", "invalid_request_error"), 401: ("authentication_error", "authentication_error"),
    404: ("invalid_request_error", "not_found_error"), 405: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"), 415: ("invalid_request_error", "invalid_request_error"),
    500: ("server_error", "api_error"), 503: ("overloaded_error", "overloaded_error"), 504: ("timeout_error", "timeout_error"),
}


@pytest.mark.parametrize("status", sorted(STATUSES))
def test_both_shapes(status: int) -> None:
    error = ApiError(status, "No.", param="n", code="c")
    kind, anthropic = KINDS[status]
    for path in ("", "/v1/chat/completions", "/v1/messagesx", "/x/v1/messages"):
        assert json.loads(error.body(path)) == {"error": {"message": "No.", "type": kind, "param": "n", "code": "c"}}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        assert json.loads(error.body(path)) == {"type": "error", "error": {"type": anthropic, "message": "No."}}
    headers = dict(error.raw_headers(b"abc"))
    assert headers.pop(b"content-type") == b"application/json" and headers.pop(b"content-length") == b"3"
    assert headers == {401: {b"www-authenticate": b"Bearer"}, 503: {b"retry-after": b"1"},
                       504: {b"x-should-retry": b"false"}}.get(status, {})


@pytest.mark.parametrize("status", [200, 403, 408, 422, 429, 502])
def test_other_statuses_do_not_exist(status: int) -> None:
    with pytest.raises(ValueError):
        ApiError(status, "No.")


MAPPED = [
    (RequestError("n is bad", "n", "context_length_exceeded"), 400, "n is bad", "n", "context_length_exceeded"),
    (CapacityError("The queue is full.", 2.1), 503, "The queue is full.", None, None),
    (EngineDead("device lost"), 503, "The engine is being restarted.", None, None),
    (TimeoutError("x"), 504, "The request was not done within its time limit.", None, None),
    (HTTPException(404), 404, "There is no such route.", None, "unknown_route"),
    (HTTPException(405, headers={"Allow": "GET"}), 405, "This route does not know the method.", None, None),
    (HTTPException(422, "odd"), 400, "odd", None, None),
    (HTTPException(502, "secret"), 500, INTERNAL, None, None),
    (ConfigError("secret"), 500, INTERNAL, None, None),
    (ValueError("secret"), 500, INTERNAL, None, None),
    (RecursionError("secret"), 500, INTERNAL, None, None),
    (KeyError("secret"), 500, INTERNAL, None, None),
]


@pytest.mark.parametrize(("exc", "status", "message", "param", "code"), MAPPED, ids=[repr(m[0])[:30] for m in MAPPED])
def test_every_exception_has_an_answer(exc: Exception, status: int, message: str, param: str | None, code: str | None) -> None:
    error = to_api_error(exc)
    assert (error.status, error.message, error.param, error.code) == (status, message, param, code)


def test_headers_of_the_exceptions() -> None:
    assert to_api_error(CapacityError("full", 2.1)).headers == {"Retry-After": "3"}
    assert to_api_error(HTTPException(405, headers={"Allow": "GET"})).headers == {"Allow": "GET"}
    error = ApiError(504, "Late.")
    assert to_api_error(error) is error
    assert [retry_after(seconds)["Retry-After"] for seconds in (0.0, 0.2, 1.0, 7.01)] == ["1", "1", "1", "8"]


def test_messages_hold_no_address_and_no_path_of_this_machine() -> None:
    text = ApiError(400, "<x at 0x7f00aa12bb> in /home/me/.cache/x.py, \"/usr/lib/y\" and /tmp/z; /v1/models stays").message
    assert text == "<x at (address)> in (path), \"(path)\" and (path); /v1/models stays"
    assert ApiError(400, "").message


@given(st.text(st.characters(codec=None), max_size=5000), st.sampled_from(["", "/v1/messages"]))
def test_every_text_makes_a_body(text: str, path: str) -> None:
    error = ApiError(400, text, param=text)
    document = json.loads(error.body(path))["error"]
    assert 0 < len(document["message"].encode()) <= MAX_MESSAGE
    assert len(document.get("param", "")) <= 200


def test_long_messages_are_cut_between_characters() -> None:
    assert ApiError(400, "é" * 5000).message == "é" * 998 + "..."
    assert clip("a" * 200) == "a" * 200 and clip("a" * 201) == "a" * 197 + "..."
