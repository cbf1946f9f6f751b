"""A Service over an engine that says what it is told to, and a way to send requests to handlers without sockets."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from octavo.config import EngineConfig
from octavo.messages import EngineRequest, SequenceEnd, StepOutput, TokenLogprobs
from octavo.models.source import ModelSource
from octavo.plan import GroupInfo
from octavo.server import chat, completions, generate, messages, responses, tokenize
from octavo.server import models as model_routes
from octavo.server.config import ServerConfig
from octavo.server.errors import to_api_error
from octavo.server.http import ClientDisconnected
from octavo.server.service import Service
from octavo.text.chat import ChatTemplate
from octavo.text.facts import TokenizerFacts
from octavo.text.intake import Intake
from octavo.text.vocabulary import Tokenizer

CORPUS = ["The capital of France is Paris. Größe 你好 🎉", '{"name": "get_weather", "arguments": {"city": "Paris"}}'] * 4
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "[TOOL_CALLS]"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HERMES = "{% if tools %}<tools>{{ tools | tojson }}</tools><tool_call>{% endif %}" + CHATML
THINKING = HERMES + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"

ROUTES = (*chat.ROUTES, *completions.ROUTES, *responses.ROUTES, *messages.ROUTES, *generate.ROUTES, *tokenize.ROUTES,
          *model_routes.ROUTES)


@lru_cache
def tokenizer(bos: bool = False) -> Tokenizer:
    """Byte-level BPE with control tokens; ``bos``: a text begins with <s>."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, normalized=False) for text in PLAIN])
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    return Tokenizer(backend, TokenizerFacts({"eos_token": "<|im_end|>"}, None, (backend.token_to_id("<|im_end|>"),)))


Script = Callable[[EngineRequest, int], Sequence[int]]


@dataclass
class FakeEngine:
    """Plays scripts: per sequence some ids, cut by max_tokens, ended by a final end token where the script has one.

    Attributes:
        script: (request, index) -> ids. per_step: ids of a sequence in one step. hold: an event that it waits for, before
            the second step. fail: after so many steps requests end with an error.
    """

    tokenizer: Tokenizer
    script: Script
    per_step: int = 1
    hold: asyncio.Event | None = None
    fail: int | None = None
    max_model_len: int = 4096
    service: Service | None = None
    prefix: str = "r"
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: set[str] = field(default_factory=set)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def info(self) -> GroupInfo:
        return GroupInfo(
            num_blocks=1024, num_host_blocks=0, block_bytes=1, block_size=16, max_model_len=self.max_model_len, max_num_seqs=64,
            max_num_batched_tokens=512, vocab_size=self.tokenizer.vocab_size + 3, device="cpu")

    def add(self, request: EngineRequest) -> None:
        self.requests.append(request)
        self.tasks.append(asyncio.create_task(self._play(request)))

    def abort(self, request_id: str, index: int | None = None) -> None:
        if index is None:
            self.aborted.add(request_id)

    async def _play(self, request: EngineRequest) -> None:
        assert self.service is not None
        name, params = request.request_id, request.params
        left = {}
        for index in range(params.width):
            ids = list(self.script(request, index))
            ends = ids[-1] in request.eos_token_ids or ids[-1] in params.stop_token_ids
            limit = params.max_tokens or 10**6
            left[index] = (ids[:limit], "stop" if ends and len(ids) <= limit else "length")
        first, whole = True, params.use_beam_search or params.width > params.n
        steps = 0
        while left and name not in self.aborted:
            await asyncio.sleep(0)
            out = StepOutput(started=[(name, 8)] if first else [])
            if first and params.prompt_logprobs is not None:
                prompt = list(request.prompt_token_ids)
                out.prompt_logprobs = [(name, [entry(token, params.prompt_logprobs) for token in prompt[1:]])]
            if self.fail == steps:
                out.ended = [SequenceEnd(name, index, "error", error="CUDA error at 0xdeadbeef") for index in left]
                left = {}
            elif whole:
                for index, (ids, reason) in left.items():
                    out.ended.append(SequenceEnd(name, index, reason, token_ids=ids, cumulative_logprob=-float(index)))
                left = {}
            else:
                self._advance(name, params.logprobs, left, out, request)
            if not left:
                out.finished = [name]
            first = False
            steps += 1
            self.service.on_step(out)
            if self.hold is not None:
                await self.hold.wait()

    def _advance(self, name: str, logprobs: int | None, left: dict[int, Any], out: StepOutput, request: EngineRequest) -> None:
        tokens: list[int] = []
        for index, (ids, reason) in list(left.items()):
            now, later = ids[: self.per_step], ids[self.per_step :]
            for token in now:
                out.streamed.append((name, index))
                tokens.append(token)
                if logprobs is not None:
                    out.logprobs.append(entry(token, logprobs))
            left[index] = (later, reason)
            if not later:
                del left[index]
                stopped = reason == "stop" and now[-1] in request.params.stop_token_ids
                out.ended.append(SequenceEnd(name, index, reason, stop_token=now[-1] if stopped else None))
        out.tokens = np.array(tokens, np.int32)


def entry(token: int, top: int) -> TokenLogprobs:
    """A token of rank 2, and the ``top`` best ones."""
    best = [(token + 1 + i) % 300 for i in range(top)]
    ids = [token, *best]
    ranks = [2, *(1 + i for i in range(top))]
    if top >= 2:  # the token itself is the second best
        ids[2] = token
    return TokenLogprobs(ids, [-0.5 * rank for rank in ranks], ranks)


class Nobody:
    """Measures nothing, whatever there is to measure."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def texts(*answers: str, end: bool = True) -> Script:
    """Each sequence says one of the texts, in turn over prompts and indices, and ends."""
    tok = tokenizer()

    def script(request: EngineRequest, index: int) -> list[int]:
        ids = tok.encode(answers[index % len(answers)], add_special_tokens=False)
        return [*ids, tok.eos_token_ids[0]] if end else ids

    return script


def make_service(script: Script, *, template: str | None = CHATML, server: dict[str, Any] | None = None,
                 engine: dict[str, Any] | None = None, generation: dict[str, Any] | None = None, bos: bool = False,
                 **fake: Any) -> tuple[Service, FakeEngine]:
    """A service that is ready, and its engine. To be called inside an event loop."""
    tok = tokenizer(bos)
    config = EngineConfig(model="some/model", **(engine or {}))
    link = FakeEngine(tok, script, **fake)
    service = Service(config, ServerConfig(**(server or {})), link, Nobody())
    link.service = service
    source = ModelSource("folder", Path("."), {}, generation or {}, "some/model")
    intake = Intake(source, config, tok, service.server.grammar_limits)
    service.equip(intake, None if template is None else ChatTemplate(template, tok.special_tokens))
    return service, link


@dataclass
class Reply:
    """What a client got.

    Attributes:
        writes: bodies as they were sent. left: the handler noticed that the client was gone.
    """

    status: int = 0
    left: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    writes: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The stream's objects; the last thing must be [DONE]."""
        *parts, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", ""), self.body
        assert all(part.startswith("data: ") and len(part.splitlines()) == 1 for part in parts), parts
        return [json.loads(part.removeprefix("data: ")) for part in parts]


async def send_request(service: Service, path: str, body: Any = None, *, method: str = "POST", leave: asyncio.Event | None = None,
                       salt: str = "", on_write: Callable[[Reply], Awaitable[None]] | None = None) -> Reply:
    """Have a handler answer; errors become answers as the server's front makes them. ``leave``: the client goes away."""
    handler, params = find(method, path)
    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", b"application/json")],
             "state": {"cache_salt": salt, "request_id": "x"}, "path_params": params, "http_version": "1.1"}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply, sent = Reply(), False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert reply.status == 0
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        assert reply.status and not reply.complete
        reply.writes.append(message["body"])
        reply.complete = not message.get("more_body", False)
        if on_write is not None:
            await on_write(reply)

    try:
        await handler(service, scope, receive, send)
    except ClientDisconnected:
        reply.left = True
    except Exception as error:
        if reply.status:
            raise
        known = to_api_error(error)
        reply.status, reply.writes, reply.complete = known.status, [known.body(path)], True
        if known.status == 500 and known is not error:
            raise
    return reply


def find(method: str, path: str) -> tuple[Any, dict[str, str]]:
    """The handler of a path and its parameters."""
    for known, pattern, handler in ROUTES:
        prefix = pattern.partition("{")[0]
        if known == method and (path == pattern or ("{" in pattern and path.startswith(prefix))):
            return handler, {"model": path.removeprefix(prefix)}
    raise AssertionError(path)


def ask(script: Script, path: str, body: Any, **options: Any) -> Reply:
    """One request to a fresh service."""

    async def run() -> Reply:
        service, link = make_service(script, **options)
        reply = await send_request(service, path, body)
        await asyncio.gather(*link.tasks)
        assert service.num_open == 0 and not service._streams and len(service._collector) == 0
        service.close()
        return reply

    return asyncio.run(run())


def sent(path: str, body: dict[str, Any], **options: Any) -> EngineRequest:
    """The request that reaches the engine when a body is posted."""

    async def run() -> EngineRequest:
        service, link = make_service(texts("x"), **options)
        reply = await send_request(service, path, body)
        assert reply.status == 200, reply.body
        service.close()
        return link.requests[0]

    return asyncio.run(run())


async def late_and_left(path: str, said: Script, late_body: dict[str, Any], left_body: dict[str, Any]) -> Reply:
    """One request that passes its deadline, and one whose client leaves: afterwards nothing of either is left.

    Returns:
        The answer to the first.
    """
    hold, leave = asyncio.Event(), asyncio.Event()
    service, link = make_service(said, hold=hold)
    late = await send_request(service, path, late_body)
    task = asyncio.create_task(send_request(service, path, left_body, leave=leave))
    while len(link.requests) < 2:
        await asyncio.sleep(0)
    leave.set()
    assert (await asyncio.wait_for(task, 5)).left
    assert link.aborted == {request.request_id for request in link.requests} and service.num_open == 0
    hold.set()
    await asyncio.gather(*link.tasks)
    service.close()
    return late
