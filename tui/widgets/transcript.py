"""The conversation on the screen. Only its recent end is mounted; what is earlier comes when one scrolls there."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from ziggurat.tui.widgets.message import MessageView, Shown

#: Characters mounted at first, and added each time the start is reached; at least so many messages in any case.
MOUNTED_CHARACTERS, MOUNTED_MESSAGES = 16_000, 2
#: Messages mounted at most while the end is followed.
MOST_MESSAGES = 80


class Transcript(VerticalScroll):
    """Shows messages, follows the end of one that grows, and lets the reader go where they like."""

    DEFAULT_CSS = """
    Transcript { height: 1fr; padding: 1 1 0 1; scrollbar-gutter: stable; scrollbar-size-vertical: 1; }
    Transcript > .transcript--earlier { height: 1; color: $text-muted; text-align: center; margin: 0 0 1 0; }
    """

    can_focus = False

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._earlier: list[Shown] = []
        self._notice = Static("", classes="transcript--earlier", markup=False)
        self._notice.display = False
        self._loading = False

    def compose(self) -> ComposeResult:
        """Compose the notice of what is not mounted."""
        yield self._notice

    def on_mount(self) -> None:
        """Follow the end."""
        self.anchor()

    @property
    def messages(self) -> list[MessageView]:
        """The mounted messages."""
        return [child for child in self.children if isinstance(child, MessageView)]

    async def show(self, messages: Sequence[Shown]) -> None:
        """Show a conversation, from its end."""
        start = _recent(messages)
        self._earlier = list(messages[:start])
        with self.app.batch_update():
            await self.remove_children(MessageView)
            self._tell()
            await self.mount_all([MessageView(shown) for shown in messages[start:]])
        self.anchor()

    async def add(self, shown: Shown, *, growing: bool = False) -> MessageView:
        """Add a message at the end and follow it."""
        view = MessageView(shown, growing=growing)
        await self.mount(view)
        self.anchor()
        self._drop_old()
        return view

    async def cut(self, message_id: str) -> None:
        """Remove a message and all after it."""
        views = self.messages
        ids = [view.shown.id for view in views]
        if message_id in ids:
            await self.remove_children(views[ids.index(message_id) :])

    def view(self, message_id: str) -> MessageView | None:
        """Return a mounted message."""
        return next((view for view in self.messages if view.shown.id == message_id), None)

    def neighbour(self, view: MessageView, step: int) -> MessageView | None:
        """Return the message before (-1) or after (1) another."""
        views = self.messages
        place = views.index(view) + step
        return views[place] if 0 <= place < len(views) else None

    def watch_scroll_y(self, old: float, new: float) -> None:
        """Mount earlier messages when the start comes into sight."""
        super().watch_scroll_y(old, new)
        if new <= 2 and new < old and self._earlier and not self._loading:
            self._loading = True
            self.run_worker(self.load_earlier(), exclusive=False)

    async def load_earlier(self) -> None:
        """Mount more of what came earlier; what is seen stays where it is."""
        try:
            start = _recent(self._earlier)
            more = [MessageView(shown) for shown in self._earlier[start:]]
            del self._earlier[start:]
            before = self.virtual_size.height
            with self.app.batch_update():
                self._tell()
                await self.mount_all(more, after=self._notice)

            def stay() -> None:
                self.release_anchor()
                self.scroll_relative(y=self.virtual_size.height - before, animate=False, force=True)
                self._loading = False

            self.call_after_refresh(stay)
        except BaseException:
            self._loading = False
            raise

    def _drop_old(self) -> None:
        views = self.messages
        if len(views) > MOST_MESSAGES:
            old = views[: len(views) - MOST_MESSAGES // 2]
            self._earlier.extend(
                Shown(view.shown.id, view.shown.role, view.body.text, view.shown.branch, view.shown.branches)
                for view in old
            )
            self.remove_children(old)
            self._tell()

    def _tell(self) -> None:
        count = len(self._earlier)
        self._notice.display = bool(count)
        self._notice.update(f"▲ {count} earlier message{'s' if count > 1 else ''}: scroll up")


def _recent(messages: Sequence[Shown]) -> int:
    """Return where the recent end of messages begins."""
    start, characters = len(messages), 0
    while start > 0:
        characters += len(messages[start - 1].text)
        if characters > MOUNTED_CHARACTERS and len(messages) - start >= MOUNTED_MESSAGES:
            break
        start -= 1
    return start
