"""Earlier chats: list, search in all their text, rename, pin, delete with undo."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input

from ziggurat.tui.conversation import Conversation
from ziggurat.tui.session_events import RecordError
from ziggurat.tui.widgets.chooser import Choice, Chooser


class Summary(Protocol):
    """A chat in the list, as the store tells it; ``updated`` seconds since the epoch."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def updated(self) -> float: ...  # noqa: D102
    @property
    def messages(self) -> int: ...  # noqa: D102
    @property
    def pinned(self) -> bool: ...  # noqa: D102
    @property
    def snippet(self) -> str: ...  # noqa: D102


class Chats(Protocol):
    """Who keeps them. All methods raise RecordError."""

    def list(self, query: str = "", limit: int = 500) -> Sequence[Summary]: ...  # noqa: D102
    def open(self, conversation_id: str) -> Conversation: ...  # noqa: D102
    def rename(self, conversation_id: str, title: str) -> None: ...  # noqa: D102
    def pin(self, conversation_id: str, pinned: bool) -> None: ...  # noqa: D102
    def delete(self, conversation_id: str) -> None: ...  # noqa: D102
    def undelete(self, conversation_id: str) -> None: ...  # noqa: D102


def age(seconds: float) -> str:
    """Return how long ago something was: 5 min ago."""
    for size, name in ((86400 * 7, "weeks"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size * (2 if name in ("weeks", "days") else 1):
            return f"{seconds / size:.0f} {name} ago"
    return "just now"


class RenameScreen(ModalScreen[str | None]):
    """Asks for a title."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Leave")]

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    def compose(self) -> ComposeResult:
        """Compose the screen."""
        with Vertical(classes="dialog small") as box:
            box.border_title = "Title"
            yield Input(self._title, select_on_focus=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Leave with the title."""
        self.dismiss(event.value.strip() or None)


class SessionsScreen(ModalScreen[str | None]):
    """Lets one choose a chat; dismissed with its name. ``now`` tells seconds since the epoch."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Leave"),
        Binding("ctrl+e", "rename", "Rename", priority=True),
        Binding("ctrl+t", "pin", "Pin", priority=True),
        Binding("ctrl+d", "delete", "Delete", priority=True),
        Binding("delete", "delete", "Delete"),
        Binding("ctrl+z", "undo", "Undo", priority=True),
    ]

    def __init__(self, store: Chats, current: str, query: str = "", *, now: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._store, self._current, self._query, self._now = store, current, query, now
        self._deleted: list[str] = []
        self._found: dict[str, Summary] = {}
        self.chooser = Chooser(search=self._search, placeholder="Search in all chats", empty="No chat has that.")

    def compose(self) -> ComposeResult:
        """Compose the screen."""
        with Vertical(classes="dialog") as box:
            box.border_title = "Chats"
            box.border_subtitle = "Enter opens · ^E rename · ^T pin · ^D delete · ^Z undo · Esc leaves"
            yield self.chooser

    def on_mount(self) -> None:
        """Search for what was asked."""
        self.chooser.field.value = self._query

    def _search(self, query: str) -> list[Choice]:
        try:
            found = self._store.list(query)
        except RecordError as error:
            self.notify(str(error), severity="error")
            return []
        self._found = {each.id: each for each in found}
        now = self._now()
        return [self._choice(each, now) for each in found]

    def _choice(self, each: Summary, now: float) -> Choice:
        mark = ("● " if each.id == self._current else "") + ("★" if each.pinned else "")
        count = f"{each.messages} message{'s' if each.messages != 1 else ''}"
        detail = f"{age(now - each.updated)} · {count}" + (f" · {each.snippet}" if each.snippet else "")
        return Choice(each.id, each.title or "Untitled", " ".join(detail.split()), mark.strip())

    def on_chooser_chosen(self, event: Chooser.Chosen) -> None:
        """Leave with the chat."""
        event.stop()
        self.dismiss(event.choice.id)

    def _marked(self) -> Summary | None:
        marked = self.chooser.marked
        return self._found.get(marked.id) if marked is not None else None

    def action_rename(self) -> None:
        """Ask for another title."""
        marked = self._marked()
        if marked is None:
            return

        def named(title: str | None) -> None:
            if title is not None:
                self._change(lambda: self._store.rename(marked.id, title))

        self.app.push_screen(RenameScreen(marked.title), named)

    def action_pin(self) -> None:
        """Have it stand before others, or not."""
        marked = self._marked()
        if marked is not None:
            self._change(lambda: self._store.pin(marked.id, not marked.pinned))

    def action_delete(self) -> None:
        """Take it out of the list."""
        marked = self._marked()
        if marked is None:
            return
        if marked.id == self._current:
            self.notify("This chat is open: begin another one first (Ctrl+N)", severity="warning")
        elif self._change(lambda: self._store.delete(marked.id)):
            self._deleted.append(marked.id)
            self.notify(f"Deleted {marked.title or 'a chat'}; Ctrl+Z brings it back")

    def action_undo(self) -> None:
        """Bring the last deleted chat back."""
        if self._deleted:
            last = self._deleted.pop()
            self._change(lambda: self._store.undelete(last))

    def _change(self, change: Callable[[], None]) -> bool:
        try:
            change()
        except RecordError as error:
            self.notify(str(error), severity="error")
            return False
        self.chooser.refresh_choices()
        return True
