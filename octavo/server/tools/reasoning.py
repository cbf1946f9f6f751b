"""Reasoning: the part of an output between ``<think>`` and ``</think>``, or another family's marks.

Owns where the reasoning begins and ends; it does not know tool calls, which inside the reasoning are none. Invariant:
only the beginning of an output is reasoning, and after its end everything is the answer, whatever it holds.

Newlines beside the marks belong to the marks, as the models' own templates have it. An output that ends inside the
reasoning is all reasoning.
"""

from octavo.server.tools.events import Content, Event, Reasoning
from octavo.server.tools.jsontext import WHITESPACE
from octavo.server.tools.markers import Frame, Markers, expect

FORMATS = {"deepseek_r1": ("<think>", "</think>"), "qwen3": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}


def detect_reasoning_format(template_text: str) -> str | None:
    """The format that a chat template speaks of, None if it speaks of none."""
    if "[THINK]" in template_text:
        return "mistral"
    if "<think>" in template_text:
        return "qwen3"
    return "deepseek_r1" if "</think>" in template_text else None


def thinking_open(prompt_text: str, reasoning_format: str | None) -> bool | None:
    """What the end of a rendered prompt says: True, the reasoning is begun; False, it is over; None, neither."""
    if reasoning_format is None:
        return None
    start, end = FORMATS[reasoning_format]
    text = prompt_text.rstrip()
    return True if text.endswith(start) else False if text.endswith(end) else None


def begins_inside(reasoning_format: str, thinking_open: bool | None) -> bool:
    """Whether an output is reasoning from its first character on, without a mark of its own."""
    return reasoning_format == "deepseek_r1" if thinking_open is None else thinking_open


class ReasoningParser:
    """Splits an output into reasoning and answer.

    Args:
        reasoning_format: a name of FORMATS. "deepseek_r1" takes an output for reasoning from its first character on unless
            the prompt closed it; the others only after the mark that begins it.
        thinking_open: see the function of this name.
    """

    def __init__(self, reasoning_format: str, thinking_open: bool | None) -> None:
        self._start, end = FORMATS[reasoning_format]
        self._end = Markers(end)
        self._default = begins_inside(reasoning_format, thinking_open)
        self._state = "before"
        self._space: list[str] = []  # before the first word, which may be the mark
        self._held = ""  # the beginning of a mark
        self._frame = Frame()

    def push(self, text: str) -> list[Event]:
        """Reasoning and Content of one more piece."""
        if self._state == "answer":
            return [Content(text)] if text else []
        text, self._held = self._held + text, ""
        if self._state == "before":
            rest = text.lstrip(WHITESPACE)
            self._space.append(text[: len(text) - len(rest)])
            found = expect(rest, 0, (self._start,)) if rest else ""
            if found == "":
                self._held = rest
                return []
            text = self._decide(rest, begun=found is not None)
        return self._reasoning(text) if self._state == "inside" else self._answer(text)

    def finish(self) -> list[Event]:
        """What waited: the output has ended."""
        held, self._held = self._held, ""
        if self._state == "before":
            held = self._decide(held, begun=False)
        if self._state == "inside":
            text = self._frame.push(held) + self._frame.finish()
            return [Reasoning(text)] if text else []
        return [Content(held)] if held else []

    def _decide(self, rest: str, begun: bool) -> str:
        self._state = "inside" if begun or self._default else "answer"
        space, self._space = "".join(self._space), []
        if begun or self._default:
            self._frame = Frame(fresh=True)
        return rest[len(self._start) :] if begun else space + rest

    def _reasoning(self, text: str) -> list[Event]:
        start, end = self._end.find(text, 0)
        shown = self._frame.push(text[:start])
        events: list[Event] = [Reasoning(shown)] if shown else []
        if start == end:
            self._held = text[start:]
            return events
        self._frame.mark()
        self._state = "after"
        return events + self._answer(text[end:])

    def _answer(self, text: str) -> list[Event]:
        """The answer, which begins after the mark's newlines."""
        if self._state == "after":
            text = text.lstrip("\n")
            if text:
                self._state = "answer"
        return [Content(text)] if text else []
