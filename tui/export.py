"""A conversation as a file for others: Markdown of what is shown, or JSON of everything."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ziggurat.tui.conversation import Conversation, Message
from ziggurat.tui.records import extras

_WHO = {"user": "You", "assistant": "Model"}
_ENDINGS = {"length": "reached its limit", "cancelled": "stopped", "failed": "broke off"}
_VERSION = 1


class ExportError(ValueError):
    """A conversation cannot be written; the message says where and why."""


def as_markdown(conversation: Conversation) -> str:
    """Return the path that is shown, with attachments in fences and thoughts folded away."""
    parts = [f"# {conversation.title or 'Chat'}"]
    if conversation.system:
        parts.append(f"**System:**\n\n{conversation.system}")
    parts += [_message(message) for message in conversation.path()]
    return "\n\n".join(parts) + "\n"


def as_json(conversation: Conversation) -> str:
    """Return all messages, those of other branches as well; ``shown`` are those of the path."""
    data = {
        "version": _VERSION,
        "id": conversation.id,
        "title": conversation.title,
        "system": conversation.system,
        "created": _time(conversation.created),
        "shown": [message.id for message in conversation.path()],
        "messages": [_record(message) for message in conversation.messages.values()],
    }
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


#: What conversations can be written as, by the end of the file's name.
FORMATS: dict[str, Callable[[Conversation], str]] = {"md": as_markdown, "json": as_json}


def export(conversation: Conversation, kind: str, path: str = "", folder: Path | None = None) -> Path:
    """Write a conversation and return where; by default to a new file named by its title. Raises ExportError.

    ``folder`` is where that is, and what a relative path begins at: by default the one the chat was started in.
    """
    if kind not in FORMATS:
        raise ExportError(f"{kind or 'nothing'} is no format: write md or json")
    folder = folder or Path.cwd()
    if path.strip():
        target = folder / Path(path.strip().strip("'\"")).expanduser()
        if target.is_dir():
            target = _free(target, conversation, kind)
    else:
        target = _free(folder, conversation, kind)
    content = FORMATS[kind](conversation).encode("utf-8", errors="replace")
    try:
        _write(target, content)
    except OSError as error:
        raise ExportError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def _write(target: Path, content: bytes) -> None:
    """Write beside the file and rename, so that nobody ever has half of one."""
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise


def _free(folder: Path, conversation: Conversation, kind: str) -> Path:
    """Return a name that no file has yet."""
    name = re.sub(r"[^\w-]+", "-", conversation.title).strip("-").lower()[:60] or "chat"
    target, number = folder / f"{name}.{kind}", 2
    while target.exists():
        target, number = folder / f"{name}-{number}.{kind}", number + 1
    return target


def _message(message: Message) -> str:
    who = _WHO[message.role] + (f" ({message.model})" if message.model else "")
    parts = [f"## {who}"]
    parts += [f"Attached: {attachment.name}\n\n{attachment.fenced()}" for attachment in message.attachments]
    if message.thought:
        parts.append(f"<details><summary>Thoughts</summary>\n\n{message.thought.strip()}\n\n</details>")
    if message.text:
        parts.append(message.text.rstrip())
    if message.ending in _ENDINGS:
        why = f": {message.error}" if message.error else ""
        parts.append(f"*The answer {_ENDINGS[message.ending]}{why}.*")
    return "\n\n".join(parts)


def _record(message: Message) -> dict[str, Any]:
    return {
        "id": message.id,
        "parent": message.parent,
        "role": message.role,
        "text": message.text,
        "created": _time(message.created),
        "ending": message.ending,
        "thought": message.thought,
        "model": message.model,
        "error": message.error,
        **extras(message),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
