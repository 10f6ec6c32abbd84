"""Messages as rows of a database and as JSON, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from ziggurat.tui.backend import Timings, Usage
from ziggurat.tui.conversation import Attachment, Message

Record = TypeVar("Record", Usage, Timings, Attachment)


def message_row(conversation_id: str, message: Message) -> tuple[Any, ...]:
    """Return id, conversation, parent, role, text, created, ending, thought, model, error, and more as JSON."""
    return (
        message.id,
        conversation_id,
        message.parent,
        message.role,
        _storable(message.text),
        message.created,
        message.ending,
        _storable(message.thought),
        message.model,
        message.error,
        json.dumps(extras(message)),
    )


def message_of(row: tuple[Any, ...], known: set[str]) -> Message:
    """Return the message of such a row. One whose parent is not ``known`` (it got lost) begins a branch of its own."""
    id, _, parent, role, text, created, ending, thought, model, error, more = row
    known.add(id)
    data = json.loads(more)
    return Message(
        id,
        parent if parent in known else None,
        role,
        text,
        created,
        attachments=tuple(_record(Attachment, each) for each in data.get("attachments", ())),
        ending=ending,
        thought=thought,
        model=model,
        error=error,
        usage=_record(Usage, data["usage"]) if data.get("usage") else None,
        timings=_record(Timings, data["timings"]) if data.get("timings") else None,
    )


def extras(message: Message) -> dict[str, Any]:
    """Return attachments, usage and timings, as far as there are any, as JSON has them."""
    found = {
        "attachments": [asdict(each) for each in message.attachments],
        "usage": asdict(message.usage) if message.usage is not None else None,
        "timings": asdict(message.timings) if message.timings is not None else None,
    }
    return {name: value for name, value in found.items() if value}


def _record(kind: type[Record], data: Mapping[str, Any]) -> Record:
    """Return a record of what is known of it: later versions may write more."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in data.items() if name in names})


def _storable(text: str) -> str:
    """Return a text that UTF-8 can write: half of a surrogate pair becomes a question mark."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
