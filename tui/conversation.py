"""A conversation as a tree: what was edited or answered again stays, as a branch that can be gone back to."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ziggurat.tui.backend import ChatMessage, Timings, Usage

#: How a message ended: it is whole, reached its limit, was stopped by the person, or broke off with an error.
Ending = Literal["stop", "length", "cancelled", "failed"]


def new_id() -> str:
    """Return a name that no other message or conversation has."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Attachment:
    """A text that goes with a message, such as a file; ``tokens`` None where they could not be counted."""

    name: str
    text: str
    tokens: int | None = None

    def fenced(self) -> str:
        """Return the text in a fence that is longer than any in it."""
        fence = "```"
        while fence in self.text:
            fence += "`"
        end = "" if self.text.endswith("\n") else "\n"
        return f"{fence}\n{self.text}{end}{fence}"


@dataclass(frozen=True)
class Message:
    """One turn. ``parent`` is the one before it, None for the first; ``created`` seconds since the epoch.

    The fields after ``ending`` are those of answers: ``thought`` is what the model thought before it, ``model`` who
    gave it, ``error`` why it failed.
    """

    id: str
    parent: str | None
    role: Literal["user", "assistant"]
    text: str
    created: float
    attachments: tuple[Attachment, ...] = ()
    ending: Ending = "stop"
    thought: str = ""
    model: str = ""
    usage: Usage | None = None
    timings: Timings | None = None
    error: str | None = None

    def content(self) -> str:
        """Return the text with its attachments, as the model reads it."""
        parts = [f"{attachment.name}:\n{attachment.fenced()}" for attachment in self.attachments]
        return "\n\n".join([*parts, self.text] if self.text else parts)


@dataclass
class Conversation:
    """Messages by name, and which of them are shown: the path from the first one to ``head``.

    Whoever goes back to a branch gets the path that was shown there last.
    """

    id: str = field(default_factory=new_id)
    title: str = ""
    system: str = ""
    created: float = field(default_factory=time.time)
    head: str | None = None
    messages: dict[str, Message] = field(default_factory=dict)
    _children: dict[str | None, list[str]] = field(default_factory=dict, repr=False)
    _shown: dict[str | None, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        messages: Iterable[Message],
        *,
        head: str | None,
        id: str,
        title: str = "",
        system: str = "",
        created: float = 0.0,
    ) -> Conversation:
        """Return a conversation of messages in the order of their making, with a path that ends at ``head``."""
        made = cls(id=id, title=title, system=system, created=created)
        for message in messages:
            made._take(message)
        made.show(head if head in made.messages else made.head)
        return made

    def add(self, message: Message) -> None:
        """Put a message at the end of its parent's, and show it."""
        self._take(message)

    def replace(self, message: Message) -> None:
        """Take a newer version of a message that is there."""
        assert self.messages[message.id].parent == message.parent
        self.messages[message.id] = message

    def discard(self, message_id: str) -> None:
        """Take away a message that nothing follows; its parent becomes the head if it was."""
        assert not self._children.get(message_id)
        message = self.messages.pop(message_id)
        siblings = self._children[message.parent]
        siblings.remove(message_id)
        if self._shown.get(message.parent) == message_id:
            del self._shown[message.parent]
            if siblings:
                self._shown[message.parent] = siblings[-1]
        if self.head == message_id:
            self.show(siblings[-1] if siblings else message.parent)

    def path(self) -> list[Message]:
        """Return what is shown, first message first."""
        return self.path_to(self.head)

    def path_to(self, message_id: str | None) -> list[Message]:
        """Return the messages from the first one to this."""
        found: list[Message] = []
        while message_id is not None:
            found.append(self.messages[message_id])
            message_id = found[-1].parent
        return found[::-1]

    def siblings(self, message_id: str) -> list[str]:
        """Return the versions of a message, oldest first, itself among them."""
        return list(self._children[self.messages[message_id].parent])

    def show(self, message_id: str | None) -> None:
        """Show the path through a message, and on from it as it was shown last. None shows an empty one."""
        place = message_id
        while place is not None:
            parent = self.messages[place].parent
            self._shown[parent] = place
            place = parent
        while message_id is not None and message_id in self._shown:
            message_id = self._shown[message_id]
        self.head = message_id

    def step(self, message_id: str, by: int) -> str:
        """Show a message's version ``by`` further on, round at the ends, and return its name."""
        versions = self.siblings(message_id)
        chosen = versions[(versions.index(message_id) + by) % len(versions)]
        self.show(chosen)
        return chosen

    def prompt(self, upto: str | None) -> tuple[ChatMessage, ...]:
        """Return what the model reads to answer a message: the system prompt and the path to it.

        Answers without any text are left out, and messages of a person that then follow each other are one: many chat
        templates refuse roles that do not take turns.
        """
        found: list[ChatMessage] = []
        for message in self.path_to(upto):
            text = message.content()
            if message.role == "assistant" and not message.text:
                continue
            if found and found[-1].role == message.role:
                text = f"{found.pop().content}\n\n{text}"
            found.append(ChatMessage(message.role, text))
        system = (ChatMessage("system", self.system),) if self.system else ()
        return (*system, *found)

    def _take(self, message: Message) -> None:
        assert message.id not in self.messages
        assert message.parent is None or message.parent in self.messages
        self.messages[message.id] = message
        self._children.setdefault(message.parent, []).append(message.id)
        self.show(message.id)


def title_of(text: str, length: int = 48) -> str:
    """Return a title for a conversation that begins with a text: its first line with words, cut at a word."""
    line = next((line.strip("#*`> \t") for line in text.splitlines() if line.strip("#*`> \t")), "")
    line = " ".join(line.split())
    if len(line) <= length:
        return line
    cut = line[: length - 1].rsplit(" ", 1)[0] if " " in line[: length - 1] else line[: length - 1]
    return cut.rstrip(" ,;:.") + "…"
