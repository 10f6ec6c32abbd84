"""The conversation on the screen. Only its recent end is mounted; what is earlier comes when one scrolls there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.reactive import Reactive
from textual.widgets import Static

from ziggurat.tui.widgets.background import background
from ziggurat.tui.widgets.message import MessageView, Shown
from ziggurat.tui.widgets.uniform import Uniform

#: Characters mounted at first, and added each time the start is reached; at least so many messages in any case.
MOUNTED_CHARACTERS, MOUNTED_MESSAGES = 16_000, 2
#: Messages mounted at most while the end is followed.
MOST_MESSAGES = 80


class Transcript(Uniform, VerticalScroll):
    """Shows messages, follows the end of one that grows, and lets the reader go where they like."""

    DEFAULT_CSS = """
    Transcript { height: 1fr; padding: 1 1 0 1; scrollbar-gutter: stable; scrollbar-size-vertical: 1; }
    Transcript > .transcript--earlier { height: 1; color: $text-muted; text-align: center; margin: 0 0 1 0; }
    """

    can_focus = False
    # see MessageBody
    virtual_size = Reactive(Size(0, 0), repaint=False)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._earlier: list[Shown] = []
        self.messages: list[MessageView] = []  # those that are mounted, or about to be
        self._notice = Static("", classes="transcript--earlier", markup=False)
        self._notice.display = False
        self._loading = False

    def compose(self) -> ComposeResult:
        """Compose the notice of what is not mounted."""
        yield self._notice

    def on_mount(self) -> None:
        """Follow the end."""
        self.anchor()

    def show(self, messages: Sequence[Shown]) -> None:
        """Show a conversation, from its end. Messages that stand there already stay mounted, up to the first other."""
        start, kept = len(self._earlier), self._same(messages)
        if not kept:
            start = _recent(messages)
            self._earlier = list(messages[:start])
        with self.app.batch_update():
            self._remove(self.messages[kept:])
            self._tell()
            more = [MessageView(shown) for shown in messages[start + kept :]]
            self.messages = [*self.messages[:kept], *more]
            self.mount_all(more)
        self.anchor()

    def _same(self, messages: Sequence[Shown]) -> int:
        """Return how many of the mounted messages stand in the same place of another path."""
        start = len(self._earlier)
        if [each.id for each in self._earlier] != [each.id for each in messages[:start]]:
            return 0
        count = 0
        for view, shown in zip(self.messages, messages[start:], strict=False):
            if not view.shows(shown):
                break
            count += 1
        return count

    def add(self, shown: Shown, *, growing: bool = False) -> MessageView:
        """Add a message at the end and follow it."""
        view = MessageView(shown, growing=growing)
        self.messages.append(view)
        self.mount(view)
        self.anchor()
        self._drop_old()
        return view

    def discard(self, message_id: str) -> None:
        """Remove a message."""
        view = self.view(message_id)
        if view is not None:
            self._remove([view])
            self.messages.remove(view)

    def _remove(self, views: Sequence[MessageView]) -> None:
        for view in views:
            view.remove()

    def view(self, message_id: str) -> MessageView | None:
        """Return a mounted message."""
        return next((view for view in reversed(self.messages) if view.shown.id == message_id), None)

    def neighbour(self, view: MessageView, step: int) -> MessageView | None:
        """Return the message before (-1) or after (1) another."""
        views = self.messages
        place = views.index(view) + step if view in views else -1
        return views[place] if 0 <= place < len(views) else None

    def watch_scroll_y(self, old: float, new: float) -> None:
        """Mount earlier messages when the start comes into sight."""
        super().watch_scroll_y(old, new)
        if new <= 2 and new < old and self._earlier and not self._loading:
            self._loading = True
            background(self, self.load_earlier)

    async def load_earlier(self) -> None:
        """Mount more of what came earlier; what is seen stays where it is."""
        try:
            start = _recent(self._earlier)
            more: list[MessageView] = [MessageView(shown) for shown in self._earlier[start:]]
            del self._earlier[start:]
            self.messages[:0] = more
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
        if len(self.messages) > MOST_MESSAGES:
            old = self.messages[: len(self.messages) - MOST_MESSAGES // 2]
            del self.messages[: len(old)]
            self._earlier.extend(replace(view.shown, text=view.body.text) for view in old)
            self._remove(old)
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
