"""``octavo chat MODEL`` or ``--url``: a conversation on the terminal or through a pipe, streamed token by token.

Owns the conversation (its history and the slash commands) and the two speakers that may be on the other side: an engine
in this process, or a server. Invariant: the history holds whole turns only; a turn that was refused leaves no trace in it.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from octavo.commands.console import input_lines, on_terminal, write_now
from octavo.commands.options import NOT_IN_CHAT, add_engine_args, add_sampling_args, sampling_changes, with_changes
from octavo.commands.remote import add_server_args, remote_model
from octavo.config import EngineConfig
from octavo.errors import ConfigError, OctavoError, RequestError
from octavo.outputs import RequestOutput
from octavo.params import SamplingParams

HELP = "/reset forgets the conversation, /exit ends it (so does Ctrl-D), /help shows this; Ctrl-C stops an answer."
FULL = "the conversation fills the context{}: /reset forgets it"
COMMAND = re.compile(r"/\w*")  # a first word such as /etc/passwd is no command
CONTEXT = "context_length_exceeded"

Messages = list[dict[str, str]]


class ChatEngine(Protocol):
    """What a chat needs of LLMEngine."""

    def add_request(self, request_id: str, prompt: Any, sampling_params: SamplingParams) -> None:
        """Queue a request."""

    def step(self) -> list[RequestOutput]:
        """Compute a step."""

    def abort_request(self, request_id: str) -> None:
        """End a request now."""

    def has_unfinished_requests(self) -> bool:
        """True while a request waits or runs."""


class Speaker(Protocol):
    """The other side of a conversation.

    Attributes:
        longest: tokens of prompt and answer together; None when that is not known.
    """

    longest: int | None

    def answer(self, messages: Messages, write: Callable[[str], None]) -> bool:
        """Stream the answer to ``write``; True when it ended because no more tokens fit. OctavoError when it fails."""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "chat", help="talk with a model",
        description=f"Talk with a model: one that is loaded here, or, without MODEL, one that a server has. {HELP}")
    parser.add_argument("--system-prompt", metavar="TEXT", help="first message of the conversation, in the system role")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="send this one message, print the answer and end")
    add_server_args(parser)
    add_sampling_args(parser, without=NOT_IN_CHAT)
    add_engine_args(parser, model="positional", optional=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Find the other side and talk until the input ends."""
    if args.model is None:
        return _run_remote(args)
    for name in ("url", "model_name", "api_key"):
        if getattr(args, name) is not None:
            raise ConfigError(f"{name} is for a server and cannot be combined with the model {args.model!r}.", name)
    return _run_local(args)


def _run_local(args: argparse.Namespace) -> int:
    config = EngineConfig.from_cli_args(args)
    if config.skip_tokenizer_init:
        raise RequestError("skip_tokenizer_init cannot be combined with chat, got True.", "skip_tokenizer_init")
    from octavo.llm import LLMEngine  # loads torch, which --help and a wrong flag must not
    from octavo.text.chat import chat_prompt

    # A conversation is for a person: the engine's lines of statistics would fall into the middle of an answer.
    engine = LLMEngine.from_engine_args(config.replace(disable_log_stats=True) if on_terminal() else config)
    try:
        params = with_changes(engine.default_params(None), sampling_changes(args))
        encode = functools.partial(chat_prompt, engine.template, engine.get_tokenizer())
        info = engine.group.info
        longest = min(info.max_model_len, info.num_blocks * info.block_size)
        return _converse(LocalSpeaker(engine, encode, params, longest), args)
    finally:
        engine.close()


def _run_remote(args: argparse.Namespace) -> int:
    with remote_model(args) as model:
        return _converse(model, args)


def _converse(speaker: Speaker, args: argparse.Namespace) -> int:
    conversation = Conversation(speaker, args.system_prompt)
    if args.quick is not None:
        return _answer(conversation, args.quick, stoppable=False)
    if on_terminal():
        print(HELP)
    return talk(conversation, input_lines(), stoppable=on_terminal())


class LocalSpeaker:
    """An engine in this process.

    Args:
        engine: adds requests and steps. encode: messages -> prompt text and token ids.
        params: for every answer; max_tokens becomes what fits where it is more.
        longest: tokens of prompt and answer together.
    """

    def __init__(self, engine: ChatEngine, encode: Callable[[Messages], tuple[str, list[int]]], params: SamplingParams,
                 longest: int) -> None:
        self.engine = engine
        self.encode = encode
        self.params = params
        self.longest: int | None = longest
        self._fits = longest
        self._turns = 0

    def answer(self, messages: Messages, write: Callable[[str], None]) -> bool:
        """As ``Speaker.answer``; RequestError with code context_length_exceeded: the conversation does not fit."""
        prompt, ids = self.encode(messages)
        fits = self._fits - len(ids)
        params = self.params
        if fits >= 1 and params.max_tokens is not None and params.max_tokens > fits:
            params = params.clone(max_tokens=fits, min_tokens=min(params.min_tokens, fits))
        self._turns += 1
        name = f"turn-{self._turns}"
        self.engine.add_request(name, {"prompt": prompt, "prompt_token_ids": ids}, params)
        shown, full = "", False
        try:
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    if output.error is not None:
                        raise OctavoError(output.error)
                    answer = output.outputs[0].text
                    write(answer[len(shown):])
                    shown = answer
                    cut = output.outputs[0].finish_reason == "length"
                    full = cut and len(output.outputs[0].token_ids) >= fits
        except KeyboardInterrupt:
            self.engine.abort_request(name)
            raise
        return full


class Conversation:
    """Messages so far, and the way to get the next answer.

    Args:
        speaker: the other side. system: text of the system message, or None.

    Attributes:
        full: the last answer ended because no more tokens fit.
    """

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        self.speaker = speaker
        self.full = False
        self.system: Messages = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.system)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages, self.full = list(self.system), False

    def answer(self, text: str, write: Callable[[str], None], *, stoppable: bool = False) -> None:
        """Send a user message and stream the answer to ``write``.

        Args:
            stoppable: Ctrl-C ends the answer, which is kept as far as it came; else it ends the program.

        Raises:
            OctavoError: the message was refused (code context_length_exceeded: it does not fit) or the answer failed;
                the history is as before.
        """
        talk = [*self.messages, {"role": "user", "content": text}]
        shown: list[str] = []
        self.full = False

        def keep(piece: str) -> None:
            shown.append(piece)
            write(piece)

        try:
            self.full = self.speaker.answer(talk, keep)
        except KeyboardInterrupt:
            if not stoppable:
                raise
        self.messages = [*talk, {"role": "assistant", "content": "".join(shown)}]


def talk(conversation: Conversation, lines: Iterator[str], *, stoppable: bool = False) -> int:
    """Answer every line until the input or the user ends; returns 1 when a message was refused, else 0."""
    code = 0
    for line in lines:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            conversation.reset()
        elif text == "/help":
            print(HELP, file=sys.stderr)
        elif text and COMMAND.fullmatch(text.split()[0]):
            print(f"octavo: error: unknown command {text.split()[0]}. {HELP}", file=sys.stderr)
            code = 1
        elif text:
            code = max(code, _answer(conversation, text, stoppable))
    return code


def _answer(conversation: Conversation, text: str, stoppable: bool) -> int:
    """Answer one message; a context that is full is said in words that name the way out."""
    longest = conversation.speaker.longest
    full = FULL.format("" if longest is None else f" of {longest} tokens")
    try:
        conversation.answer(text, write_now, stoppable=stoppable)
    except OctavoError as error:
        known = isinstance(error, RequestError) and error.code == CONTEXT and conversation.messages
        print(f"octavo: error: {full + '.' if known else error}", file=sys.stderr)
        return 1
    finally:
        print(flush=True)
    if conversation.full:
        print(f"[{full}]", file=sys.stderr)
    return 0
