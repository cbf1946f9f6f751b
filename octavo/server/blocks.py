"""Blocks: one answer as a row of blocks (reasoning, text, calls), for the APIs whose answers are such rows.

Owns where a block begins and ends; it does not know how any API writes one. Invariant: at most one block is open, its changes
are open, more ..., close, and an answer that has ended has at least one block and none that is open.
"""

from dataclasses import dataclass, field
from typing import Literal

from octavo.server.logprobs import TokenLogprob
from octavo.server.tools.events import CallArguments, CallStart, Content, Event, Reasoning
from octavo.server.turn import Piece

Kind = Literal["reasoning", "text", "call"]
State = Literal["open", "whole", "cut"]


@dataclass(slots=True)
class Block:
    """One of an answer's blocks.

    Attributes:
        index: 0, 1, ... within the answer. name: of the tool that a call calls. parts: the text, or a call's arguments (JSON
            text), in fragments. state: "cut" where the answer ended before the block did.
        logprobs: of its tokens, where somebody gathers them.
    """

    index: int
    kind: Kind
    name: str = ""
    parts: list[str] = field(default_factory=list)
    state: State = "open"
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All fragments."""
        return "".join(self.parts)


@dataclass(slots=True)
class Change:
    """What happens to a block. text, logprobs: what is new, with "more"."""

    what: Literal["open", "more", "close"]
    block: Block
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Blocks:
    """The blocks of one choice, as far as they are known."""

    def __init__(self) -> None:
        self.row: list[Block] = []

    @property
    def last(self) -> Block | None:
        """The newest block."""
        return self.row[-1] if self.row else None

    @property
    def called(self) -> bool:
        """Whether a tool is called, with arguments that are whole."""
        return any(block.kind == "call" and block.state == "whole" for block in self.row)

    def take(self, piece: Piece) -> list[Change]:
        """What a piece changes, in order."""
        changes: list[Change] = []
        for event in piece.events:
            self._take(event, changes)
        if piece.finish_reason is not None:
            if not self.row:
                self._open("text", changes)  # clients look at the first block without asking whether there is one
            self._close(piece.finish_reason != "length", changes)
        return changes

    def _take(self, event: Event, changes: list[Change]) -> None:
        if isinstance(event, Content):
            self._more("text", event.text, changes)
        elif isinstance(event, Reasoning):
            self._more("reasoning", event.text, changes)
        elif isinstance(event, CallStart):
            self._open("call", changes, event.name)
        elif isinstance(event, CallArguments):
            self._more("call", event.fragment, changes)
        else:
            self._close(event.complete, changes)

    def _open(self, kind: Kind, changes: list[Change], name: str = "") -> Block:
        self._close(True, changes)
        block = Block(len(self.row), kind, name)
        self.row.append(block)
        changes.append(Change("open", block))
        return block

    def _more(self, kind: Kind, text: str, changes: list[Change]) -> None:
        block = self.last
        if block is None or block.state != "open" or block.kind != kind:
            block = self._open(kind, changes)
        block.parts.append(text)
        changes.append(Change("more", block, text))

    def _close(self, whole: bool, changes: list[Change]) -> None:
        block = self.last
        if block is not None and block.state == "open":
            block.state = "whole" if whole else "cut"
            changes.append(Change("close", block))
