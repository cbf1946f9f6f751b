"""What a parser says about a model's output: events.

Owns five small records; it knows neither formats nor APIs. Invariant: joined in order, the texts and fragments of one
output are the same for every way of cutting it into pieces; every CallStart has exactly one CallEnd, and between the two
come that call's arguments and nothing else.
"""

from collections.abc import Iterable

import msgspec


class Content(msgspec.Struct, frozen=True):
    """More of the answer's text; never empty."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """More of the text that leads to the answer; never empty."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A tool call begins. index: 0, 1, ... within the output. name: as the model wrote it, among the tools or not."""

    index: int
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """More of a call's arguments, which are the JSON text of one object; never empty."""

    index: int
    fragment: str


class CallEnd(msgspec.Struct, frozen=True):
    """A call has ended. complete: False where its arguments are cut off, so that they are no valid JSON."""

    index: int
    complete: bool = True


Event = Content | Reasoning | CallStart | CallArguments | CallEnd


def join(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbours of a kind made one."""
    joined: list[Event] = []
    parts: list[str] = []
    last: Event | None = None
    for event in events:
        part = _part(event)
        if last is not None and (part is None or _kind(event) != _kind(last)):
            joined.append(_whole(last, parts))
            parts, last = [], None
        if part is None:
            joined.append(event)
        else:
            last = event
            parts.append(part)
    if last is not None:
        joined.append(_whole(last, parts))
    return joined


def _part(event: Event) -> str | None:
    if isinstance(event, (Content, Reasoning)):
        return event.text
    return event.fragment if isinstance(event, CallArguments) else None


def _kind(event: Event) -> tuple[type, int]:
    return type(event), event.index if isinstance(event, CallArguments) else 0


def _whole(event: Event, parts: list[str]) -> Event:
    if len(parts) == 1:
        return event
    text = "".join(parts)
    if isinstance(event, CallArguments):
        return CallArguments(event.index, text)
    return Reasoning(text) if isinstance(event, Reasoning) else Content(text)
