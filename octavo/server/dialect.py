"""Dialect: what the APIs need whose conversations are not written in chat's words.

Owns the reading of texts out of nested items, and the way back of a mistake into the client's words; it does not know any API.
Invariant: a client is told of fields that it can find in its own request.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.errors import RequestError
from octavo.server.exchange import Begin, Exchange, serve
from octavo.server.service import Service

K = TypeVar("K", bound=msgspec.Struct)


async def serve_dialect(service: Service, scope: Scope, receive: Receive, send: Send, kind: type[K], begin: Begin[K],
                        names: Callable[[K], Mapping[str, str]]) -> None:
    """As ``serve``, with mistakes told in the client's words; names: of a request, see ``translated``."""
    found: Mapping[str, str] | None = None

    def begin_once_read(service: Service, request: K, key_salt: str) -> Exchange:
        nonlocal found
        found = names(request)
        return begin(service, request, key_salt)

    try:
        await serve(service, scope, receive, send, kind, begin_once_read)
    except RequestError as error:
        if found is None:  # who could not read the body speaks of it as it is
            raise
        raise translated(error, found) from None


def translated(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """A mistake in a client's words; names: ours -> the client's, where the two differ.

    They are replaced in the word with which the message begins, and such as are no words of English also in the rest of it.
    """
    place, space, rest = str(error).partition(" ")
    for ours, theirs in names.items():
        name = rf"(?<!\w){re.escape(ours)}(?!\w)"
        place = re.sub(name, theirs, place)
        if "_" in ours:
            rest = re.sub(name, theirs, rest)
    param = error.param
    return RequestError(place + space + rest, None if param is None else names.get(param, param), error.code)


def string_of(item: Mapping[str, Any], key: str, place: str) -> str:
    """The string under a key; RequestError names the place, such as "input[2]"."""
    value = item.get(key)
    if not isinstance(value, str):
        raise wrong(f"{place}.{key} must be a string, got {value!r:.200}.", place)
    return value


def texts_of(content: object, kinds: Collection[str], place: str) -> str | list[dict[str, Any]]:
    """A content that may hold text only, as chat writes it.

    Args:
        content: a string, or a list of parts. kinds: types of parts that are text.
    """
    if isinstance(content, str):
        return content
    return [text_part(string_of(part, "text", where)) for where, part in parts_of(content, kinds, place)]


def parts_of(content: object, kinds: Collection[str], place: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, part) of a list of parts, each of one of these types."""
    if not isinstance(content, list):
        raise wrong(f"{place} must be a string or a list of parts, got {content!r:.200}.", place)
    found = []
    for number, part in enumerate(content):
        where = f"{place}[{number}]"
        if not isinstance(part, dict):
            raise wrong(f"{where} must be an object, got {part!r:.200}.", place)
        if part.get("type") not in kinds:
            raise wrong(f"{where}: type {part.get('type')!r:.80} is not supported here, only {', '.join(kinds)}.", place)
        found.append((where, part))
    return found


def text_part(text: str) -> dict[str, Any]:
    """A text as a part of chat's."""
    return {"type": "text", "text": text}


def function_tool(tool: Mapping[str, Any], schema: str) -> dict[str, Any]:
    """A flat function as chat's tool; schema: the key of its parameters. Keys that say nothing to a model stay out."""
    names = {"name": "name", "description": "description", "parameters": schema, "strict": "strict"}
    return {"type": "function", "function": {
        ours: tool[theirs] for ours, theirs in names.items() if tool.get(theirs) is not None}}


def named_choice(name: object) -> dict[str, Any]:
    """A named function as chat's tool_choice."""
    return {"type": "function", "function": {"name": name}}


def wrong(message: str, place: str) -> RequestError:
    """A mistake at a place such as "input[2].content"; its field is what the place begins with."""
    return RequestError(message, place.partition("[")[0].partition(".")[0])
