"""What a session tells its listeners, and who keeps what happens in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from ziggurat.tui.backend import BackendError
from ziggurat.tui.conversation import Conversation, Message

#: ``waiting``: the request is out and nothing came; ``reading``: the prompt is read; ``retrying``: it failed and is
#: tried again soon.
State = Literal["idle", "waiting", "reading", "answering", "retrying"]


@dataclass(frozen=True)
class PathChanged:
    """What is shown is another path, or another conversation: all of it has to be shown anew."""


@dataclass(frozen=True)
class Added:
    """A message came at the end of what is shown. An answer comes empty, with ``Grew`` to follow."""

    message: Message


@dataclass(frozen=True)
class Grew:
    """New text of the answer that runs. ``thought``: of what the model thinks before it."""

    message_id: str
    text: str
    thought: bool = False


@dataclass(frozen=True)
class Finished:
    """The answer ended: whole, stopped, or broken off (``message.ending``)."""

    message: Message


@dataclass(frozen=True)
class Discarded:
    """An answer that failed before any text is shown no more."""

    message_id: str


@dataclass(frozen=True)
class StateChanged:
    """The session does something else now."""

    state: State


@dataclass(frozen=True)
class Failed:
    """The request failed. ``retry_in`` seconds it is tried again; None when it is not, see ``Session.retry``."""

    error: BackendError
    retry_in: float | None = None


@dataclass(frozen=True)
class Titled:
    """The conversation has another title."""

    title: str


@dataclass(frozen=True)
class NotSaved:
    """What happened could not be kept; the chat goes on."""

    error: RecordError


SessionEvent = PathChanged | Added | Grew | Finished | Discarded | StateChanged | Failed | Titled | NotSaved
Listener = Callable[[SessionEvent], None]


class RecordError(Exception):
    """What should be kept, or was, cannot be written or read; the message is one line with the remedy."""


class Recorder(Protocol):
    """Who keeps conversations. Only finished messages come here. All methods raise RecordError."""

    def begin(self, conversation: Conversation) -> None:
        """Keep a conversation that has no messages yet."""
        ...

    def add(self, conversation_id: str, message: Message) -> None:
        """Keep a message, as the conversation's head."""
        ...

    def change(self, conversation: Conversation) -> None:
        """Keep the title, the system prompt and the head."""
        ...


class NoRecorder:
    """Keeps nothing."""

    def begin(self, conversation: Conversation) -> None:
        """Keep nothing."""

    def add(self, conversation_id: str, message: Message) -> None:
        """Keep nothing."""

    def change(self, conversation: Conversation) -> None:
        """Keep nothing."""
