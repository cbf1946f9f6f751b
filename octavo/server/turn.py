"""Turn: one turn of a conversation, from messages and tools to high-level events; what chat, responses and messages share.

Owns the way of messages through the template, the choice of parsers and grammars, and finish reasons; it does not know the
shape of any API's answer: that is made of Pieces, streamed or folded. Invariant: joined per choice, the events of a turn are
the same however the engine's steps cut its text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from octavo.errors import RequestError
from octavo.outputs import PositionLogprobs
from octavo.params import SamplingParams, StructuredOutputsParams
from octavo.server.chunks import Counter
from octavo.server.exchange import News
from octavo.server.prompting import Conversation, choose_template, echo_text, render
from octavo.server.sampling_fields import (
    Prompts,
    SamplingFields,
    check_count,
    check_fields,
    check_length,
    check_timeout,
    constraint,
    make_asks,
    need_tokenizer,
    to_params,
    truncated,
)
from octavo.server.service import Ask, Service
from octavo.server.tools.definitions import Tool, ToolChoice, check_tool_choice, check_tools
from octavo.server.tools.events import CallStart, Content, Event, Reasoning
from octavo.server.tools.forced import Forced, force_calls
from octavo.server.tools.parser import (
    REASONING_FORMATS,
    OutputParser,
    detect_reasoning_format,
    detect_tool_format,
    make_parser,
    needs_special_tokens,
    thinking_open,
)
from octavo.text.deltas import Delta
from octavo.text.grammar import HEADER, check
from octavo.text.vocabulary import Tokenizer

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class Piece:
    """What one step adds to one choice.

    Attributes:
        logprobs: one per id, None unless asked for. finish_reason: in the last Piece of a choice.
    """

    index: int
    events: Sequence[Event]
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class Turn:
    """A turn under way.

    Args:
        fields: how to sample. conversation: what was said. key_salt: see make_asks.
        max_tokens: None fills what fits. logprobs: alternatives per token, None for none.

    Attributes:
        asks, timeout: for the service. prompt_ids: of the one prompt. counter: usage so far. params: what is sampled with.

    Raises:
        RequestError: messages, tools or fields are refused.
    """

    def __init__(self, service: Service, fields: SamplingFields, conversation: Conversation, key_salt: str, *,
                 max_tokens: int | None, logprobs: int | None = None) -> None:
        server, self.tokenizer = service.server, need_tokenizer(service)
        check_fields(fields)
        check_count(conversation.messages, fields.truncate_prompt_tokens, service)
        rules = _Rules(service, self.tokenizer, conversation)
        text, ids = rules.prompt(
            bool(fields.add_special_tokens), lambda text: check_length(text, fields.truncate_prompt_tokens, service))
        wanted = rules.constrain(text, constraint(fields, service))
        self.params: SamplingParams = to_params(
            fields, service, max_tokens=max_tokens, structured=wanted, logprobs=logprobs,
            prompt_logprobs=fields.prompt_logprobs)
        if rules.shows_special:
            self.params = self.params.clone(skip_special_tokens=False)
        prompts = truncated(Prompts([text], [ids]), fields.truncate_prompt_tokens, max_tokens, service)
        self.asks: list[Ask] = make_asks(
            prompts, self.params, service, key_salt, explicit_max=max_tokens is not None, fields=fields)
        self.prompt_ids = prompts.ids[0]
        self.timeout = check_timeout(fields.timeout)
        self.counter = Counter(len(self.prompt_ids), server.enable_prompt_tokens_details)
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        echoed = echo_text(conversation)
        self._outputs = [_Output(rules.parser(), echoed, rules.choice.mode in ("auto", "required"),
                                 conversation.include_reasoning) for _ in range(self.params.n)]

    def pieces(self, news: News) -> Iterator[Piece]:
        """What some news add to the choices, in order."""
        for _, step in news:
            self.counter.take(step)
            if step.prompt_logprobs is not None:
                self.prompt_logprobs = step.prompt_logprobs
            for delta in step.deltas:
                yield self._outputs[delta.index].piece(delta)


class _Output:
    """One choice: its parser, and whether it has called a tool."""

    def __init__(self, parser: OutputParser | None, echoed: str, tells_calls: bool, include_reasoning: bool) -> None:
        self._parser, self._echoed, self._tells_calls = parser, echoed, tells_calls
        self._include_reasoning, self._called = include_reasoning, False

    def piece(self, delta: Delta) -> Piece:
        reason: Any = delta.finish_reason
        if self._parser is None:
            events: list[Event] = [Content(delta.text)] if delta.text else []
        else:
            events = self._parsed(self._parser, delta)
            if self._called and reason == "stop" and self._tells_calls:
                reason = "tool_calls"
        if self._echoed:
            events.insert(0, Content(self._echoed))
            self._echoed = ""
        return Piece(delta.index, events, delta.token_ids, delta.logprobs, reason, delta.stop_reason)

    def _parsed(self, parser: OutputParser, delta: Delta) -> list[Event]:
        events = parser.push(delta.text)
        if delta.finish_reason is not None:
            events = events + parser.finish()
        if not self._include_reasoning:
            events = [event for event in events if not isinstance(event, Reasoning)]
        self._called = self._called or any(isinstance(event, CallStart) for event in events)
        return events


class _Rules:
    """Which tools the model sees, and how its output is forced and read."""

    def __init__(self, service: Service, tokenizer: Tokenizer, conversation: Conversation) -> None:
        server, self._conversation, self._tokenizer = service.server, conversation, tokenizer
        self._end_ids, self._limits = service.intake.eos_token_ids, service.intake.limits
        self._template = choose_template(service, conversation.chat_template)
        self._content_format = server.chat_template_content_format
        self._tools: list[Tool] = check_tools(conversation.tools, self._limits)
        self.choice: ToolChoice = check_tool_choice(conversation.tool_choice, self._tools)
        listed = [] if self.choice.mode == "none" else [dict(tool.definition) for tool in self._tools]
        self._shown_tools = listed or None
        source = self._template.source(self._shown_tools)
        self._tool_format = server.tool_call_parser or detect_tool_format(source)
        reasoning = detect_reasoning_format(source) if server.reasoning_parser is None else server.reasoning_parser
        self._reasoning_format = None if reasoning == "none" else reasoning
        self._thinking: bool | None = None
        self.forced: Forced | None = None
        if self.choice.mode == "auto":
            if not server.enable_auto_tool_choice:
                raise RequestError("tool_choice must be required or a named function here: this server does not let the model "
                                   "choose by itself.", "tool_choice")
            if self._tool_format is None:
                raise RequestError("This model's chat template knows no tools; tool_choice must be required or a named "
                                   "function.", "tools")

    def prompt(self, add_special_tokens: bool, look: Callable[[str], None] | None = None) -> tuple[str, list[int]]:
        """The prompt's text and ids; ``look`` sees the text before it is tokenised."""
        return render(self._template, self._tokenizer, self._conversation, self._shown_tools, add_special_tokens,
                      self._content_format, look)

    def constrain(self, prompt_text: str, wanted: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
        """What the whole output must look like, once the prompt is there: its end says whether reasoning has begun.

        Args:
            wanted: what the answer must look like; reasoning before it and calls in its place stay free.
        """
        if self._reasoning_format is not None:
            self._thinking = thinking_open(prompt_text, self._reasoning_format)
            if self._thinking is None and self._conversation.continue_final_message:
                start, end = REASONING_FORMATS[self._reasoning_format]
                self._thinking = prompt_text.rfind(start) > prompt_text.rfind(end)
        answer = None
        if wanted is not None and wanted.grammar is not None:
            if self._shown_tools:
                raise RequestError("A grammar cannot be combined with tools.", "tools")
            self._reasoning_format = None  # it speaks of the whole output
        elif wanted is not None:
            whole = self._check(wanted, "structured_outputs")
            answer = whole.removeprefix(HEADER).removeprefix("start: ")
        self.forced = force_calls(
            self.choice, self._tools, self._tool_format, parallel=self._conversation.parallel_tool_calls, answer=answer,
            special=special_texts(self._tokenizer), reasoning_format=self._reasoning_format, thinking_open=self._thinking)
        if self.forced is None:
            return wanted
        composed = StructuredOutputsParams(grammar=self.forced.grammar)
        self._check(composed, "tools" if self._shown_tools else "structured_outputs")
        return composed

    def _check(self, wanted: StructuredOutputsParams, param: str) -> str:
        return check(wanted, self._tokenizer, param, self._end_ids, self._limits).text

    @property
    def shows_special(self) -> bool:
        """Whether the parser needs to see control tokens."""
        return needs_special_tokens(self._calls, self._reasoning_format, special_texts(self._tokenizer))

    @property
    def _calls(self) -> str | None:
        if self.forced is not None:
            return self.forced.tool_format
        return self._tool_format if self._shown_tools else None

    def parser(self) -> OutputParser | None:
        """A parser for one choice; None where its text is the answer."""
        if self._calls is None and self._reasoning_format is None:
            return None
        ends = [self._tokenizer.token_text(token) for token in self._tokenizer.eos_token_ids] if self.shows_special else []
        return make_parser(
            self._calls, self._reasoning_format, self._shown_tools, thinking_open=self._thinking,
            end_tokens=[end for end in ends if end], name=None if self.forced is None else self.forced.name)


@lru_cache(maxsize=4)
def special_texts(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Text -> id of a vocabulary's control tokens."""
    return {tokenizer.added[token].content: token for token in sorted(tokenizer.special_ids)}


def prompt_of(service: Service, conversation: Conversation, add_special_tokens: bool = False) -> tuple[str, list[int]]:
    """The text and the ids of the prompt that a turn would have; errors as Turn."""
    return _Rules(service, need_tokenizer(service), conversation).prompt(add_special_tokens)
