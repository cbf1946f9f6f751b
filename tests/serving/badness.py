"""Bad requests of every class (cases.jsonl), how they are sent, and what their answers must look like.

A line of cases.jsonl: ``id``; ``p`` path and ``m`` method (default: POST /v1/completions); the body as ``body`` (JSON), ``raw``
(text as it is) or ``gen`` (an expression that gives bytes); ``headers`` or ``gen_headers``, ``key`` (default: a good one);
``want`` allowed statuses; ``t`` seconds to answer in (default 2); ``param``, ``code`` of the error where they are promised;
``why``. In ``body`` and ``gen``, "@V" stands for the vocabulary's size and "@M" for the greatest length.
"""

import json
import re
from pathlib import Path
from typing import Any

from served import MAX_MODEL_LEN
from tinymodel import VOCAB
from web import KEY, OTHER_KEY, Reply, call

CASES = [json.loads(line) for line in Path(__file__).with_name("cases.jsonl").read_text().splitlines()]
HEAVY = {"B26", "A10", "B27", "D05", "D46", "D44", "T09", "T10", "D43"}
"""Cases that bring megabytes, or as much work."""
LIGHT = [case for case in CASES if case["id"] not in HEAVY]
MARKS = {"@V": VOCAB, "@M": MAX_MODEL_LEN}
TYPES = {401: "authentication_error", 500: "server_error", 503: "overloaded_error", 504: "timeout_error"}
ANTHROPIC = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}


def fill(value: Any) -> Any:
    """The value with the numbers of this server in it."""
    if isinstance(value, dict):
        return {str(fill(name)): fill(item) for name, item in value.items()}
    if isinstance(value, list):
        return [fill(item) for item in value]
    return MARKS.get(value, value) if isinstance(value, str) else value


def body_of(case: dict[str, Any]) -> bytes | None:
    if "gen" in case:
        text = case["gen"]
        for mark, value in MARKS.items():
            text = text.replace(mark, str(value))
        data: bytes = eval(text, {"json": json, "__import__": __import__})
        return data
    if "raw" in case:
        raw: str = case["raw"]
        return raw.encode()
    return json.dumps(fill(case["body"])).encode() if "body" in case else None


async def send(port: int, case: dict[str, Any]) -> Reply:
    headers = case.get("headers", {}) | eval(case.get("gen_headers", "{}"))
    return await call(port, case.get("p", "/v1/completions"), body_of(case), method=case.get("m", "POST"),
                      key=case.get("key", KEY), headers=headers)


def check(case: dict[str, Any], reply: Reply) -> None:
    """Status, time and shape of an answer."""
    assert reply.status in case["want"] and reply.whole, (case["id"], reply.status, reply.body[:300])
    assert reply.seconds <= case.get("t", 2.0), (case["id"], reply.seconds)
    if reply.status < 400:
        return
    path = case.get("p", "/v1/completions")
    document = reply.json
    error = document["error"]
    if path.startswith("/v1/messages"):
        assert set(document) == {"type", "error"} and set(error) == {"type", "message"}, document
        assert error["type"] == ANTHROPIC.get(reply.status, "invalid_request_error")
    else:
        assert set(document) == {"error"} and set(error) == {"message", "type", "param", "code"}, document
        assert error["type"] == TYPES.get(reply.status, "invalid_request_error")
        assert all(error[name] == case[name] for name in ("param", "code") if name in case), (case["id"], error)
    message = error["message"]
    assert message and len(message.encode()) <= 2000
    assert not re.search(r"0x[0-9a-f]{4}|Traceback|/work/|/usr/|/tmp/|/home/|\.py\b", message), message
    assert KEY not in message and OTHER_KEY not in message
    sent = body_of(case)
    if sent is not None and len(sent) > 400:  # no part of what was sent comes back at length
        text = sent.decode("utf-8", "replace")
        assert not any(message[i : i + 210] in text for i in range(max(0, len(message) - 210))), message
    assert reply.headers["content-type"] == "application/json"
    assert "www-authenticate" in reply.headers if reply.status == 401 else "allow" in reply.headers or reply.status != 405
