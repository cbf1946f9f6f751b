"""octavo.server.generate: vLLM 0.1.0's API."""

import itertools
import json
from typing import Any

import pytest
from fake_service import ask, texts

PATH = "/generate"
SAID = texts("The capital 🎉 of", "Paris 你好")


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"stop": "pit"}, {"use_beam_search": True, "n": 2, "temperature": 0},
                                     {"best_of": 3}, {"max_tokens": 2}])
@pytest.mark.parametrize("per_step", [1, 3])
def test_whole_and_streamed(options: dict[str, Any], per_step: int) -> None:
    whole = ask(SAID, PATH, {"prompt": "Hi", **options}, per_step=per_step)
    assert whole.status == 200 and whole.headers["content-type"] == "application/json" and set(whole.json) == {"text"}
    assert len(whole.json["text"]) == options.get("n", 1) and all(text.startswith("Hi") for text in whole.json["text"])
    stream = ask(SAID, PATH, {"prompt": "Hi", "stream": True, **options}, per_step=per_step)
    assert stream.headers["content-type"] == "application/octet-stream" and stream.complete
    *objects, rest = stream.body.split(b"\0")
    states = [json.loads(state)["text"] for state in objects]
    assert rest == b"" and states[-1] == whole.json["text"]
    for before, after in itertools.pairwise(states):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_the_default_length_is_16() -> None:
    reply = ask(texts("a" * 40, end=False), PATH, {"prompt": "Hi"})
    assert reply.json == {"text": ["Hi" + "a" * 16]}


@pytest.mark.parametrize(("body", "param"), [
    ({}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": "a", "logprobs": 1}, "logprobs"), ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "model": "x"}, "model"), ({"prompt": "a", "use_beam_search": True}, "best_of"),
    ({"prompt": "a", "structured_outputs": {}}, "structured_outputs"), ({"prompt": "a", "timeout": -1}, "timeout")])
def test_refusals(body: dict[str, Any], param: str) -> None:
    reply = ask(SAID, PATH, body)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


def test_an_error_within_a_stream() -> None:
    reply = ask(SAID, PATH, {"prompt": "Hi", "stream": True}, fail=1)
    assert reply.status == 200 and reply.complete and reply.body.endswith(b"\0")
    assert json.loads(reply.body.split(b"\0")[-2])["error"]["message"] == "The request failed."
