"""The items of a response: those that come in as messages, those that go out with the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from ziggurat.runtime.engine import Message
from ziggurat.runtime.server.schemas.responses import (
    InputCall,
    InputMessage,
    InputReasoning,
    InputResult,
    ResponsesRequest,
    joined,
)
from ziggurat.runtime.server.tools.deltas import ArgumentsDelta, CallDelta, Delta, TextDelta

Event = dict[str, Any]

_ROLES = {"developer": "system"}


def messages_of(body: ResponsesRequest) -> tuple[Message, ...]:
    """Return the input as messages, instructions first; calls are part of the assistant's message before them."""
    given = body.input
    items: Sequence[Any] = given if isinstance(given, list) else [InputMessage(role="user", content=given)]
    found = [Message("system", body.instructions)] if body.instructions else []
    for item in items:
        last = found[-1] if found else None
        if isinstance(item, InputMessage):
            role = _ROLES.get(item.role, item.role)
            text = joined(item.content)
            if last is not None and last.role == role == "system":  # many templates take one only
                found[-1] = Message("system", f"{last.content}\n\n{text}")
            else:
                found.append(Message(role, text))
        elif isinstance(item, InputCall):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if last is None or last.role != "assistant":
                last = Message("assistant", "")
                found.append(last)
            found[-1] = Message("assistant", last.content, {"tool_calls": [*last.more.get("tool_calls", ()), call]})
        elif isinstance(item, InputResult):
            found.append(Message("tool", joined(item.output), {"tool_call_id": item.call_id}))
        else:
            assert isinstance(item, InputReasoning)
    return tuple(found)


def new_id(kind: str) -> str:
    """Return an id of a response (``resp``), a message (``msg``) or a call (``fc``)."""
    return f"{kind}_{uuid.uuid4().hex}"


class OutputItems:
    """What an answer consists of, as far as it was made. Each addition returns the events that tell of it."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False
        self._pieces: list[str] = []  # of the open item's text or arguments
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is still held back

    def add(self, deltas: Sequence[Delta], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Add what is new, and the log-probabilities of its tokens."""
        self._logprobs += logprobs
        events: list[Event] = []
        for delta in deltas:
            if isinstance(delta, TextDelta):
                events += self._text(delta.text)
            elif isinstance(delta, CallDelta):
                events += self._call(delta)
            else:
                events += self._arguments(delta)
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """End what is open; an answer of nothing is an empty message."""
        events = [] if self.items else self._begin_message()
        return events + self._end(status)

    def _event(self, kind: str, **fields: Any) -> Event:
        item = self.items[-1]
        return {"type": f"response.{kind}", "item_id": item["id"], "output_index": len(self.items) - 1, **fields}

    def _added(self, item: dict[str, Any]) -> list[Event]:
        self.items.append(item)
        self._open, self._pieces = True, []
        at = len(self.items) - 1
        return [{"type": "response.output_item.added", "output_index": at, "item": _copy(item)}]

    def _begin_message(self) -> list[Event]:
        events = self._added(
            {"id": new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        )
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"].append(part)
        return [*events, self._event("content_part.added", content_index=0, part=_copy(part))]

    def _text(self, text: str) -> list[Event]:
        events = []
        if not self._open or self.items[-1]["type"] != "message":
            events = self._end() + self._begin_message()
        self._pieces.append(text)
        logprobs, self._logprobs = self._logprobs, []
        self.items[-1]["content"][0]["logprobs"] += logprobs
        return [*events, self._event("output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _call(self, delta: CallDelta) -> list[Event]:
        self._logprobs = []
        call = {"id": new_id("fc"), "type": "function_call", "call_id": delta.id, "name": delta.name}
        return self._end() + self._added({**call, "arguments": "", "status": "in_progress"})

    def _arguments(self, delta: ArgumentsDelta) -> list[Event]:
        self._logprobs = []
        self._pieces.append(delta.text)
        return [self._event("function_call_arguments.delta", delta=delta.text)]

    def _end(self, status: str = "completed") -> list[Event]:
        if not self._open:
            return []
        self._open = False
        item, text = self.items[-1], "".join(self._pieces)
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            part["text"] = text
            events = [
                self._event("output_text.done", content_index=0, text=text, logprobs=part["logprobs"]),
                self._event("content_part.done", content_index=0, part=part),
            ]
        else:
            item["arguments"] = text
            events = [self._event("function_call_arguments.done", name=item["name"], arguments=text)]
        return [*events, {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}]


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    """Return what an item is now: events are encoded at once, but more is added to it before others are."""
    return {key: list(one) if isinstance(one, list) else one for key, one in value.items()}
