"""octavo.server.completions: every option streamed and whole, in the shapes of OpenAI's own types."""

import asyncio
import itertools
from typing import Any

import pytest
from fake_service import Reply, ask, entry, make_service, send_request, texts, tokenizer
from openai.types import Completion

from octavo.server import completions
from octavo.server.logprobs import TokenNames

PATH = "/v1/completions"
SAID = texts("The capital 🎉 of Größe", "Paris 你好 is")


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def fold(events: list[Any]) -> dict[int, dict[str, Any]]:
    """A stream's chunks as choices of a whole answer."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in events:
        assert chunk["object"] == "text_completion" and len(chunk["choices"]) <= 1
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {
                "text": "", "logprobs": None, "finish_reason": None, "stop_reason": None, "token_ids": None,
                "prompt_token_ids": None})
            assert choice["finish_reason"] is None, "a chunk after the last one"
            choice["text"] += part["text"]
            if part["logprobs"] is not None:
                logprobs = choice["logprobs"] = choice["logprobs"] or {name: [] for name in part["logprobs"]}
                for name, values in part["logprobs"].items():
                    logprobs[name] += values
            if "token_ids" in part:
                choice["token_ids"] = (choice["token_ids"] or []) + part["token_ids"]
            if "prompt_token_ids" in part:
                assert choice["prompt_token_ids"] is None
                choice["prompt_token_ids"] = part["prompt_token_ids"]
            choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part.get("stop_reason")
    return choices


def without_null(answer: Any) -> Any:
    """OpenAI's own types forget the null that OpenAI sends for the first token of an echo."""
    for choice in answer["choices"]:
        if choice["logprobs"] and choice["logprobs"]["token_logprobs"][0] is None:
            choice["logprobs"]["token_logprobs"][0], choice["logprobs"]["top_logprobs"][0] = 0.0, {}
    return answer


OPTIONS: list[dict[str, Any]] = [
    {}, {"n": 2}, {"echo": True}, {"logprobs": 0}, {"logprobs": 2}, {"echo": True, "logprobs": 1, "n": 2},
    {"stop": "pit"}, {"stop": ["zz", " is"], "include_stop_str_in_output": True}, {"max_tokens": 3},
    {"max_tokens": 0, "echo": True, "logprobs": 1}, {"max_tokens": 0, "echo": True}, {"return_token_ids": True, "n": 2},
    {"logprobs": 1, "return_tokens_as_token_ids": True}, {"logprobs": 2, "stop": "ap"}, {"best_of": 3, "n": 2},
    {"use_beam_search": True, "n": 2}, {"skip_special_tokens": False, "include_stop_str_in_output": True},
    {"stop_token_ids": ids("al")}, {"prompt": ["Hi", "The Größe"], "n": 2, "echo": True},
    {"prompt": [5, 6, 7], "echo": True, "logprobs": 1}, {"prompt": [[5], ids("Paris <s> is")], "echo": True, "logprobs": 3},
    {"prompt": "<s>Hi", "echo": True, "logprobs": 0}, {"truncate_prompt_tokens": 1, "echo": True, "return_token_ids": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)) or "plain")
def test_the_fold_of_a_stream_is_the_whole_answer(options: dict[str, Any]) -> None:
    body = {"prompt": "Hi", "max_tokens": 40, **options}
    answers = []
    for per_step in (1, 2, 3, 100):
        whole = ask(SAID, PATH, body, per_step=per_step)
        assert whole.status == 200 and whole.headers["content-type"] == "application/json"
        Completion.model_validate(without_null(whole.json), strict=True)
        answers.append(whole.json["choices"])
        stream = ask(SAID, PATH, {**body, "stream": True, "stream_options": {"include_usage": True}}, per_step=per_step)
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8" and stream.complete
        *chunks, last = stream.events
        folded = fold(chunks)
        assert [folded[i] | {"index": i, "prompt_logprobs": None} for i in sorted(folded)] == whole.json["choices"]
        assert last["choices"] == [] and last["usage"] == whole.json["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert {chunk["id"] for chunk in stream.events} == {last["id"]} and last["id"].startswith("cmpl-")
    assert all(answer == answers[0] for answer in answers), "the engine's steps show in the answer"


def test_the_whole_answer() -> None:
    reply = ask(texts("Paris"), PATH, {"prompt": "Hi", "model": "some/model", "n": 2}).json
    assert reply["object"] == "text_completion" and reply["model"] == "some/model"
    assert reply["choices"][1] == {
        "index": 1, "text": "Paris", "logprobs": None, "finish_reason": "stop", "stop_reason": None, "token_ids": None,
        "prompt_token_ids": None, "prompt_logprobs": None}
    count = len(ids("Paris")) + 1
    assert reply["usage"] == {"prompt_tokens": len(ids("Hi")), "completion_tokens": 2 * count,
                              "total_tokens": len(ids("Hi")) + 2 * count, "prompt_tokens_details": None}


def test_choices_are_numbered_prompt_by_prompt() -> None:
    reply = ask(texts("a", "b"), PATH, {"prompt": ["X", "Y"], "n": 2, "echo": True}).json
    assert [choice["text"] for choice in reply["choices"]] == ["Xa", "Xb", "Ya", "Yb"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]


def test_logprobs_of_an_echo_begin_with_null() -> None:
    prompt = "Hi 🎉"
    reply = ask(texts("Paris!"), PATH, {"prompt": prompt, "echo": True, "logprobs": 1}).json["choices"][0]
    logprobs, both = reply["logprobs"], ids(prompt) + ids("Paris!") + [tokenizer().eos_token_id]
    assert reply["text"] == prompt + "Paris!"
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [-1.0] * (len(both) - 1)
    assert logprobs["tokens"] == [tokenizer().token_text(token) for token in both]
    # One alternative, of rank 1, and the token itself, of rank 2.
    assert all(sorted(top.values()) == [-1.0, -0.5] for top in logprobs["top_logprobs"][1:])
    texts_of = [tokenizer().decode([token]) for token in both]
    starts = [0, *itertools.accumulate(map(len, texts_of))][:-1]
    assert logprobs["text_offset"] == starts


def test_offsets_of_characters_in_several_tokens() -> None:
    """The bytes of a character that the vocabulary does not know as one all lie where it lies."""
    said = [tokenizer().encode(char)[0] for char in "ab"] + ids("\U0001f916") + ids("c")
    reply = ask(lambda request, index: said, PATH, {"prompt": "Hi", "logprobs": 0, "max_tokens": len(said)}).json["choices"][0]
    parts = len(ids("\U0001f916"))
    assert parts > 1 and reply["text"] == "ab\U0001f916c"
    assert reply["logprobs"]["text_offset"] == [0, 1, *[2] * parts, 3]
    assert all(list(top.values()) == [-1.0] for top in reply["logprobs"]["top_logprobs"])


def test_an_echo_is_made_once_per_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []
    real, entries = TokenNames.completion, completions.prompt_entries
    monkeypatch.setattr(TokenNames, "completion", lambda self, positions, token_ids, *rest: (
        made.append(list(token_ids)), real(self, positions, token_ids, *rest))[1])
    monkeypatch.setattr(completions, "prompt_entries", lambda positions, token_ids, top: (
        made.append(list(token_ids)), entries(positions, token_ids, top))[1])
    body = {"prompt": ["The Größe", "Hi you"], "n": 8, "echo": True, "logprobs": 1, "prompt_logprobs": 1, "max_tokens": 2}
    choices = ask(SAID, PATH, body).json["choices"]
    assert len(choices) == 16 and all(choice["logprobs"]["tokens"] for choice in choices)
    assert choices[0]["prompt_logprobs"] == choices[7]["prompt_logprobs"] != choices[8]["prompt_logprobs"]
    assert made.count(ids("The Größe")) == made.count(ids("Hi you")) == 2  # once as an echo, once as prompt_logprobs


ENTRIES = 1000
BEYOND: dict[str, tuple[str, dict[str, Any], str | None]] = {
    # 4 ids of a prompt; a model of 100 tokens
    "outputs": (PATH, {"prompt": [5] * 4, "logprobs": 4, "n": 2, "max_tokens": 96}, None),
    "one more": (PATH, {"prompt": [5] * 4, "logprobs": 4, "n": 3, "max_tokens": 67}, "logprobs"),
    "echoes": (PATH, {"prompt": [5] * 90, "logprobs": 4, "n": 2, "max_tokens": 0, "echo": True}, None),
    "more echoes": (PATH, {"prompt": [5] * 90, "logprobs": 4, "n": 3, "max_tokens": 0, "echo": True}, "logprobs"),
    "both": (PATH, {"prompt": [5] * 90, "logprobs": 4, "n": 2, "max_tokens": 10, "echo": True}, None),
    "prompts": (PATH, {"prompt": [[5] * 50] * 5, "prompt_logprobs": 4, "max_tokens": 1}, "prompt_logprobs"),
    "scores": (PATH, {"prompt": [5] * 90, "prompt_logprobs": 4, "n": 3, "max_tokens": 1}, "prompt_logprobs"),
    "best of": (PATH, {"prompt": [5], "logprobs": 4, "n": 1, "best_of": 4, "max_tokens": 60}, "logprobs"),
    "more than there are": (PATH, {"prompt": [5], "logprobs": 10**9, "max_tokens": 10}, "logprobs"),
    "chat": ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 4, "n": 2, "max_tokens": 20}, None),
    "chat, what fits": ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 4, "n": 16}, "top_logprobs"),
    "chat, its prompt": ("/v1/chat/completions", {"prompt_logprobs": 4, "n": 64, "max_tokens": 20}, None),
    "responses": ("/v1/responses", {"include": ["message.output_text.logprobs"], "top_logprobs": 20}, "top_logprobs"),
}


@pytest.mark.parametrize(("path", "body", "param"), BEYOND.values(), ids=BEYOND.keys())
def test_an_answer_holds_only_so_many_logprobs(path: str, body: dict[str, Any], param: str | None) -> None:
    given = {PATH: {}, "/v1/responses": {"input": "a"}}.get(path, {"messages": [{"role": "user", "content": "a"}]})
    reply = ask(SAID, path, given | body, server={"max_logprob_entries": ENTRIES}, max_model_len=100)
    if param is None:
        assert reply.status == 200, reply.body
        return
    assert reply.status == 400 and reply.json["error"]["param"] == param
    if "could hold" in (said := reply.json["error"]["message"]):
        assert said.startswith(param) and f"{ENTRIES} are allowed" in said


def test_ordinary_use_is_far_from_the_limit() -> None:
    body = {"prompt": [5] * 4, "logprobs": 5, "n": 8, "max_tokens": 4096}
    assert ask(SAID, PATH, body, max_model_len=16_000).status == 200
    assert ask(SAID, PATH, body | {"n": 64, "logprobs": 20}, max_model_len=16_000).status == 400


def test_a_begin_token_has_no_place_in_the_echo() -> None:
    reply = ask(texts("x"), PATH, {"prompt": "Hi", "echo": True, "logprobs": 0}, bos=True).json["choices"][0]
    assert reply["text"] == "Hix" and reply["logprobs"]["tokens"][:3] == ["<s>", "H", "i"]
    assert reply["logprobs"]["text_offset"][:4] == [0, 0, 1, 2]
    bare = ask(texts("x"), PATH, {"prompt": "Hi", "echo": True, "logprobs": 0, "add_special_tokens": False}, bos=True)
    assert bare.json["choices"][0]["logprobs"]["tokens"][:2] == ["H", "i"]


def test_scoring_only() -> None:
    body = {"prompt": "Hi", "max_tokens": 0, "echo": True, "logprobs": 1}
    reply = ask(SAID, PATH, body, server={"enable_prompt_tokens_details": True}).json
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}
    choice = reply["choices"][0]
    assert (choice["text"], choice["finish_reason"], reply["usage"]["completion_tokens"]) == ("Hi", "length", 0)
    assert len(choice["logprobs"]["tokens"]) == len(ids("Hi"))


def test_prompt_logprobs() -> None:
    body = {"prompt": "Hi", "prompt_logprobs": 2, "echo": True, "logprobs": 1, "max_tokens": 2}
    choice = ask(SAID, PATH, body).json["choices"][0]
    token = ids("Hi")[1]
    best = entry(token, 2)
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == 2
    found = choice["prompt_logprobs"][1]
    assert set(found) == set(map(str, best.token_ids))
    assert found[str(token)] == {"logprob": -1.0, "rank": 2, "decoded_token": "i"}
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2  # its own count, not that of prompt_logprobs


def test_continuous_usage() -> None:
    body = {"prompt": "Hi", "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    events = ask(texts("Paris is"), PATH, body).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == len(ids("Paris is")) + 1
    assert all(event["usage"]["total_tokens"] == counts[i] + 2 for i, event in enumerate(events))


def test_cached_tokens_are_told_where_the_operator_wants_it() -> None:
    reply = ask(SAID, PATH, {"prompt": ["Hi", "Ho"]}, server={"enable_prompt_tokens_details": True}).json
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


def test_usage_is_forced_where_the_operator_wants_it() -> None:
    events = ask(SAID, PATH, {"prompt": "Hi", "stream": True}, server={"enable_force_include_usage": True}).events
    assert events[-1]["choices"] == [] and events[-1]["usage"]["prompt_tokens"] == 2
    assert all("usage" not in event for event in ask(SAID, PATH, {"prompt": "Hi", "stream": True}).events)


@pytest.mark.parametrize(("body", "param", "status"), [
    ({}, "prompt", 400), ({"prompt": []}, "prompt", 400), ({"prompt": ["a", 1]}, "prompt", 400),
    ({"prompt": [[]]}, "prompt", 400), ({"prompt": ""}, "prompt", 400), ({"prompt": [True]}, "prompt[0]", 400),
    ({"prompt": [10**30]}, "prompt", 400), ({"prompt": [-1]}, "prompt", 400), ({"prompt": "a", "suffix": "b"}, "suffix", 400),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", 400), ({"prompt": "a", "max_tokens": -1}, "max_tokens", 400),
    ({"prompt": "a", "model": "other"}, "model", 404), ({"prompt": "a", "logprobs": 21}, "logprobs", 400),
    ({"prompt": "a", "logprobs": True}, "logprobs", 400), ({"prompt": "a", "n": 129}, "n", 400),
    ({"prompt": ["a"] * 1025}, "prompt", 400), ({"prompt": ["a"] * 100, "n": 100}, "n", 400),
    ({"prompt": "a" * 9000}, "prompt", 400), ({"prompt": "a", "max_tokens": 5000}, "max_tokens", 400),
    ({"prompt": "a", "stream_options": {}}, "stream_options", 400), ({"prompt": "a\ud800"}, None, 400),
    ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", 400),
    ({"prompt": "a", "use_beam_search": True, "n": 2, "logprobs": 1}, "logprobs", 400),
])
def test_refusals(body: dict[str, Any], param: str | None, status: int) -> None:
    reply = ask(SAID, PATH, body)
    assert (reply.status, reply.json["error"]["param"]) == (status, param), reply.body
    assert len(reply.body) < 2500


def test_long_prompts_say_so() -> None:
    reply = ask(SAID, PATH, {"prompt": "Paris 你好" * 900}, max_model_len=64)
    assert reply.json["error"]["code"] == "context_length_exceeded"
    assert ask(SAID, PATH, {"prompt": "a", "model": "x"}).json["error"]["code"] == "model_not_found"


def test_the_default_length_never_refuses() -> None:
    said = texts("a" * 100, end=False)
    reply = ask(said, PATH, {"prompt": [5] * 60}, max_model_len=64)
    assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == 4
    assert ask(said, PATH, {"prompt": [5] * 10}, max_model_len=64).json["usage"]["completion_tokens"] == 16
    assert ask(said, PATH, {"prompt": [5], "min_tokens": 30}).json["usage"]["completion_tokens"] == 30
    cut = ask(said, PATH, {"prompt": [5] * 90, "truncate_prompt_tokens": -1, "max_tokens": 20}, max_model_len=64).json
    assert (cut["usage"]["prompt_tokens"], cut["usage"]["completion_tokens"]) == (44, 20)


async def running(options: dict[str, Any], **fake: Any) -> tuple[Any, Any, asyncio.Event, "asyncio.Task[Reply]"]:
    """A request whose engine has made its first step and waits."""
    hold, leave = asyncio.Event(), asyncio.Event()
    service, link = make_service(SAID, hold=hold, **fake)
    task = asyncio.create_task(send_request(service, PATH, {"prompt": "Hi", **options}, leave=leave))
    for _ in range(50):
        await asyncio.sleep(0)
    assert link.requests and not task.done()
    return service, link, leave, task


@pytest.mark.parametrize("options", [{"stream": True}, {}, {"n": 3}, {"prompt": ["a", "b", "c"], "stream": True}])
def test_a_client_that_leaves_ends_its_request(options: dict[str, Any]) -> None:
    async def run() -> None:
        service, link, leave, task = await running(options)
        leave.set()
        reply = await asyncio.wait_for(task, 5)
        assert reply.left and not reply.complete
        assert link.aborted == {request.request_id for request in link.requests}
        assert service.num_open == 0 and not service._streams
        assert link.hold is not None
        link.hold.set()
        await asyncio.gather(*link.tasks)

    asyncio.run(run())


def test_all_that_one_step_brings_leaves_in_one_write() -> None:
    body = {"prompt": "Hi", "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    reply = ask(texts("Paris is", "The cap"), PATH, body, per_step=2)
    steps = max(len(ids("Paris is")), len(ids("The cap"))) // 2 + 1
    assert len(reply.writes) <= steps
    assert reply.writes[0].count(b"data: ") == 2 and reply.writes[-1].endswith(b"data: [DONE]\n\n")
