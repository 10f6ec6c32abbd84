"""Reads an answer as the engine makes it: its text, the tools that it calls, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ziggurat.runtime.engine import Event, FinishEvent
from ziggurat.runtime.server.tools.deltas import CallDelta, Delta, TextDelta
from ziggurat.runtime.server.tools.parser import ToolCallParser

Reason = Literal["stop", "length", "tool_calls"]


@dataclass
class Call:
    """A call as far as it is read; ``arguments`` are pieces of a JSON text."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """The arguments so far."""
        return "".join(self.pieces)


class Answer:
    """One answer as far as it is made. ``parser`` finds calls in it; without one everything is text."""

    def __init__(self, parser: ToolCallParser | None = None) -> None:
        self.calls: list[Call] = []
        self._parser = parser
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def complete(self) -> bool:
        """Whether nothing more is wanted, although the model may go on."""
        return self._parser is not None and self._parser.finished

    def add(self, event: Event) -> list[Delta]:
        """Take an event and return what is new."""
        parser = self._parser
        if parser is None:
            deltas: list[Delta] = [TextDelta(event.text)] if event.text else []
        else:
            deltas = parser.feed(event.text)
            if isinstance(event, FinishEvent):
                deltas += parser.finish()
        for delta in deltas:
            if isinstance(delta, TextDelta):
                self._pieces.append(delta.text)
            elif isinstance(delta, CallDelta):
                self.calls.append(Call(delta.id, delta.name))
            else:
                self.calls[delta.index].pieces.append(delta.text)
        return deltas

    def reason(self, end: FinishEvent) -> Reason:
        """Return why it ended, as OpenAI's API tells it."""
        if end.reason == "length":
            return "length"
        return "tool_calls" if self.calls else "stop"
