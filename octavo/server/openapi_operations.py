"""The operations of the OpenAPI document: what each route takes, gives and may be refused with, with examples.

Owns this table; it does not know how a document is written (openapi.py) or what a field may hold (openapi_fields.py).
Invariant: one entry per route and method that app.py serves.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from octavo.server.chat import ChatRequest, ChatResponse
from octavo.server.completions import CompletionRequest, CompletionResponse
from octavo.server.generate import BINARY, GenerateRequest, GenerateResponse
from octavo.server.messages import Message, TokenCount
from octavo.server.messages_input import MessagesRequest, Said
from octavo.server.models import ModelCard, ModelList
from octavo.server.responses_input import ResponsesRequest
from octavo.server.responses_output import Response
from octavo.server.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

SSE = "text/event-stream"
READ = (400, 401, 503)
"""Refusals of every route that needs the model: a head that is no good, a missing key, no engine."""
WRITTEN = (400, 401, 404, 413, 415, 503)
"""Those of a route with a body."""
GENERATED = (*WRITTEN, 500, 504)
QUESTION = {"role": "user", "content": "What is the capital of France?"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather in a city.", "parameters": PARAMETERS}


class Version(msgspec.Struct):
    """The version of Octavo."""

    version: str


class Load(msgspec.Struct):
    """Requests that wait or run here."""

    server_load: int


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route and method.

    Attributes:
        path: as the router has it. request, response: structs of the bodies; None for none.
        media: of the answer where it is no JSON. stream: media type of the answer to ``stream: true``.
        refusals: statuses with an error as body. unready: the body of a 503 is a Status.
        examples: requests by name; each is answered with 200 by a model that has a chat template.
    """

    method: str
    path: str
    tag: str
    summary: str
    request: type[msgspec.Struct] | None = None
    response: type[msgspec.Struct] | None = None
    media: str | None = None
    stream: str | None = None
    refusals: tuple[int, ...] = ()
    unready: bool = False
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)


def _probe(path: str, summary: str, method: str = "GET") -> Operation:
    return Operation(method=method, path=path, tag="Probes", summary=summary, unready=True, refusals=(400,))


OPERATIONS = (
    Operation(
        method="POST", path="/v1/chat/completions", tag="OpenAI", summary="Answer a conversation",
        request=ChatRequest, response=ChatResponse, stream=SSE, refusals=GENERATED, examples={
            "question": {"messages": [QUESTION], "max_completion_tokens": 8},
            "stream": {"messages": [QUESTION], "max_completion_tokens": 8, "stream": True,
                       "stream_options": {"include_usage": True}},
            "logprobs": {"messages": [QUESTION], "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2},
            "schema": {"messages": [QUESTION], "max_completion_tokens": 16, "response_format": {
                "type": "json_schema", "json_schema": {"name": "answer", "schema": PARAMETERS}}},
            "tool": {"messages": [QUESTION], "max_completion_tokens": 16, "tool_choice": "required",
                     "tools": [{"type": "function", "function": WEATHER}]}}),
    Operation(
        method="POST", path="/v1/completions", tag="OpenAI", summary="Continue prompts",
        request=CompletionRequest, response=CompletionResponse, stream=SSE, refusals=GENERATED, examples={
            "text": {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
            "several": {"prompt": ["One", "Two"], "max_tokens": 4, "n": 2, "seed": 1},
            "score": {"prompt": "The capital", "max_tokens": 0, "echo": True, "logprobs": 1}}),
    Operation(
        method="POST", path="/v1/responses", tag="OpenAI", summary="Answer a conversation, in the shape of Responses",
        request=ResponsesRequest, response=Response, stream=SSE, refusals=GENERATED, examples={
            "question": {"input": QUESTION["content"], "max_output_tokens": 8},
            "stream": {"input": [QUESTION], "max_output_tokens": 8, "stream": True},
            "tool": {"input": [QUESTION], "max_output_tokens": 16, "tool_choice": "required",
                     "tools": [{"type": "function", **WEATHER}]}}),
    Operation(
        method="GET", path="/v1/responses/{response_id}", tag="OpenAI", summary="Nothing: no response is kept",
        refusals=(400, 401, 404, 503)),
    Operation(
        method="GET", path="/v1/models", tag="OpenAI", summary="List the model under its names", response=ModelList,
        refusals=READ),
    Operation(
        method="GET", path="/v1/models/{model:path}", tag="OpenAI", summary="Describe the model under one of its names",
        response=ModelCard, refusals=(*READ, 404)),
    Operation(
        method="POST", path="/v1/messages", tag="Anthropic", summary="Answer a conversation, in the shape of Messages",
        request=MessagesRequest, response=Message, stream=SSE, refusals=GENERATED, examples={
            "question": {"messages": [QUESTION], "max_tokens": 8},
            "stream": {"messages": [QUESTION], "max_tokens": 8, "system": "Be brief.", "stream": True},
            "tool": {"messages": [QUESTION], "max_tokens": 16, "tool_choice": {"type": "any"},
                     "tools": [{"name": "get_weather", "input_schema": PARAMETERS}]}}),
    Operation(
        method="POST", path="/v1/messages/count_tokens", tag="Anthropic", summary="Count the tokens of a conversation",
        request=Said, response=TokenCount, refusals=WRITTEN, examples={"question": {"messages": [QUESTION]}}),
    Operation(
        method="POST", path="/generate", tag="vLLM", summary="Continue a prompt, in the shape of vLLM 0.1.0",
        request=GenerateRequest, response=GenerateResponse, stream=BINARY,
        refusals=tuple(status for status in GENERATED if status != 404), examples={
            "text": {"prompt": "The capital of France is", "max_tokens": 8},
            "choice": {"prompt": "Yes or no?", "max_tokens": 8, "structured_outputs": {"choice": ["yes", "no"]}}}),
    Operation(
        method="POST", path="/tokenize", tag="vLLM", summary="Turn a text or a conversation into token ids",
        request=TokenizeRequest, response=TokenizeResponse, refusals=WRITTEN,
        examples={"text": {"prompt": "Hello"}, "conversation": {"messages": [QUESTION], "return_token_strs": True}}),
    Operation(
        method="POST", path="/detokenize", tag="vLLM", summary="Turn token ids into text",
        request=DetokenizeRequest, response=DetokenizeResponse, refusals=WRITTEN, examples={"ids": {"tokens": [1, 2, 3]}}),
    _probe("/health", "Is it ready, and does it make progress? 200 while draining too"),
    _probe("/ping", "As /health"),
    _probe("/ping", "As /health", "POST"),
    _probe("/livez", "As /health, and 200 while loading"),
    _probe("/ready", "Does it take requests?"),
    _probe("/readyz", "As /ready"),
    Operation(method="GET", path="/version", tag="Probes", summary="The version", response=Version, refusals=(400, 401)),
    Operation(method="GET", path="/load", tag="Probes", summary="Open requests", response=Load, refusals=(400, 401)),
    Operation(
        method="GET", path="/metrics", tag="Probes", summary="Metrics for Prometheus", media="text/plain", refusals=(400, 401)),
    Operation(
        method="GET", path="/openapi.json", tag="Probes", summary="This document", media="application/json", refusals=READ),
    Operation(method="GET", path="/", tag="Page", summary="A page to chat on", media="text/html", refusals=(400,)),
)
