"""How messages of a conversation are put into words for the transcript."""

from __future__ import annotations

from ziggurat.tui.conversation import Conversation, Message
from ziggurat.tui.widgets.message import Shown

_ENDINGS = {"length": "cut at the limit of tokens or context", "cancelled": "stopped", "failed": "broken off"}


def shown_of(conversation: Conversation, message: Message) -> Shown:
    """Return what is shown of a message."""
    versions = conversation.siblings(message.id)
    return Shown(
        message.id,
        message.role,
        message.text,
        versions.index(message.id) + 1,
        len(versions),
        note_of(message),
        message.model if message.role == "assistant" else "",
        message.thought,
    )


def note_of(message: Message) -> str:
    """Return the line below a message: attachments, how it ended, its figures."""
    parts = [
        f"+ {each.name}" + (f" ({each.tokens} tokens)" if each.tokens is not None else "")
        for each in message.attachments
    ]
    if message.role == "assistant":
        if message.ending in _ENDINGS:
            parts.append(_ENDINGS[message.ending] + (f": {message.error}" if message.error else ""))
        if message.usage is not None:
            count = message.usage.generated_tokens
            parts.append(f"{count} token{'s' if count != 1 else ''}")
        if message.timings is not None and message.timings.decode_tokens_per_second:
            parts.append(f"{message.timings.decode_tokens_per_second:.1f} tok/s")
        if message.thought:
            parts.append("t shows its thoughts")
    return " · ".join(parts)
