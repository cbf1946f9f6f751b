"""A server as the other side of a conversation or the author of a continuation, for a program without an event loop.

Owns the event loop, the bodies of the requests and what ends an answer; it does not know the terminal or the history.
Invariant: Ctrl-C closes the connection, by which the server knows that nobody waits for the rest.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

from octavo.client.chunks import CHAT, COMPLETIONS, stream
from octavo.client.connection import Address, Client, Refusal
from octavo.client.models import pick_model
from octavo.client.wire import ConnectionFailed
from octavo.errors import RequestError

CONTEXT = "context_length_exceeded"


class RemoteModel:
    """A model behind a server; a context manager.

    Args:
        client: to the server. model: name for the server. longest: tokens of prompt and answer together, where known.
        fields: of every request beside the prompt, such as sampling parameters. runner: of the client's event loop.
    """

    def __init__(self, client: Client, model: str, longest: int | None, fields: Mapping[str, Any],
                 runner: asyncio.Runner) -> None:
        self.client, self.model, self.longest, self.fields = client, model, longest, dict(fields)
        self._runner = runner

    def answer(self, messages: Sequence[Mapping[str, str]], write: Callable[[str], None]) -> bool:
        """Stream the answer to a conversation; True when it ended because no more tokens fit.

        Raises:
            RequestError: the conversation does not fit (code context_length_exceeded). OctavoError: all other failures.
            KeyboardInterrupt: after the request was given up.
        """
        return self._run(CHAT, {"messages": list(messages)}, write)

    def complete(self, prompt: str, write: Callable[[str], None]) -> None:
        """Stream the continuation of a text; raises as ``answer`` does."""
        self._run(COMPLETIONS, {"prompt": prompt}, write)

    def _run(self, path: str, what: Mapping[str, Any], write: Callable[[str], None]) -> bool:
        body = {"model": self.model, **what, "stream": True, "stream_options": {"include_usage": True}, **self.fields}
        try:
            return self._runner.run(self._stream(path, body, write))
        except Refusal as error:
            if error.code == CONTEXT:
                raise RequestError(str(error), "messages", CONTEXT) from None
            raise

    async def _stream(self, path: str, body: Mapping[str, Any], write: Callable[[str], None]) -> bool:
        reason, tokens = None, 0
        async with aclosing(stream(self.client, path, body)) as arrivals:
            async for chunks in arrivals:
                for chunk in chunks:
                    for choice in chunk.choices:
                        if choice.said:
                            write(choice.said)
                        reason = choice.finish_reason or reason
                    if chunk.usage is not None:
                        tokens = chunk.usage.prompt_tokens + (chunk.usage.completion_tokens or 0)
        if reason is None:
            raise ConnectionFailed("the server ended its answer without a finish_reason")
        return reason == "length" and self.longest is not None and tokens >= self.longest

    def __enter__(self) -> "RemoteModel":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._runner.run(self.client.close())
        finally:
            self._runner.close()


def open_model(address: Address, api_key: str | None, name: str | None, fields: Mapping[str, Any]) -> RemoteModel:
    """A model of a server, by its name there or the first one; OctavoError when it cannot be had."""
    client, runner = Client(address, api_key=api_key), asyncio.Runner()
    try:
        model, longest = runner.run(pick_model(client, name))
    except BaseException:
        runner.run(client.close())
        runner.close()
        raise
    return RemoteModel(client, model, longest, fields, runner)
