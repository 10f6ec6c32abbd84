"""What can be done with a message: edit, answer again, copy, go through its versions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ziggurat.tui.conversation import Attachment
from ziggurat.tui.widgets.message import MessageView, code_blocks

if TYPE_CHECKING:
    from ziggurat.tui.screens.chat import ChatScreen


class MessageActions:
    """Does it on a chat screen, and remembers which message is being edited."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self._edited: str | None = None
        self._before = ""
        self._copied: tuple[str, int] = ("", -1)

    def do(self, view: MessageView, what: str) -> None:
        """Do what was asked for."""
        getattr(self, f"_{what}")(view)

    def _idle(self) -> bool:
        if self._screen.session.busy:
            self._screen.notify("An answer runs: Esc stops it.")
            return False
        return True

    def _edit(self, view: MessageView) -> None:
        if not self._idle():
            return
        screen, messages = self._screen, self._screen.session.conversation.messages
        message = messages.get(view.shown.id)
        if message is not None and message.role == "assistant" and message.parent is not None:
            message = messages[message.parent]
        if message is None or message.role != "user":
            return
        if self._edited is None:
            self._before = screen.prompt.area.whole_text
        self._edited = message.id
        screen.prompt.text = message.text
        screen.set_attachments(list(message.attachments))
        screen.banner.say(
            "editing an earlier message: Enter sends it as a new version, Esc leaves it", "notice", "edit"
        )
        screen.prompt.focus()

    def leave(self) -> bool:
        """Edit no more; what was typed before comes back. False if nothing was edited."""
        if self._edited is None:
            return False
        self._edited = None
        self._screen.prompt.text = self._before
        self._screen.set_attachments([])
        self._screen.banner.clear("edit")
        return True

    def resend(self, text: str, attachments: tuple[Attachment, ...]) -> bool:
        """Send the edited message; False if none was."""
        edited, self._edited = self._edited, None
        if edited is None or edited not in self._screen.session.conversation.messages:
            return False
        self._screen.session.edit(edited, text, attachments)
        self._screen.prompt.text = self._before
        return True

    def _regenerate(self, view: MessageView) -> None:
        if self._idle():
            self._screen.banner.clear("error")
            self._screen.session.regenerate(view.shown.id)
            self._screen.prompt.focus()

    def _copy(self, view: MessageView) -> None:
        text = view.body.text
        self._screen.app.copy_to_clipboard(text)
        self._screen.notify(f"Copied {len(text)} characters")

    def _copy_code(self, view: MessageView) -> None:
        blocks = code_blocks(view.body.text)
        if not blocks:
            self._screen.notify("There is no code in this message")
            return
        last, place = self._copied
        place = (place + 1) % len(blocks) if last == view.shown.id else 0
        self._copied = (view.shown.id, place)
        self._screen.app.copy_to_clipboard(blocks[place])
        more = f"; {place + 1} of {len(blocks)}, y again takes the next" if len(blocks) > 1 else ""
        self._screen.notify(f"Copied {blocks[place].count(chr(10)) + 1} lines of code{more}")

    def _previous_branch(self, view: MessageView) -> None:
        self._step(view, -1)

    def _next_branch(self, view: MessageView) -> None:
        self._step(view, 1)

    def _step(self, view: MessageView, by: int) -> None:
        if view.shown.branches < 2 or not self._idle():
            return
        transcript = self._screen.transcript
        place = transcript.messages.index(view) - len(transcript.messages)
        path = self._screen.session.conversation.path()
        from_start = [message.id for message in path].index(view.shown.id)
        self._screen.session.step(view.shown.id, by)
        shown = self._screen.session.conversation.path()[from_start].id
        found = transcript.view(shown)
        (found or transcript.messages[max(place, -len(transcript.messages))]).focus()

    def _up(self, view: MessageView) -> None:
        found = self._screen.transcript.neighbour(view, -1)
        if found is not None:
            found.focus()

    def _down(self, view: MessageView) -> None:
        found = self._screen.transcript.neighbour(view, 1)
        if found is not None:
            found.focus()
        else:
            self._screen.prompt.focus()

    def _leave(self, view: MessageView) -> None:
        if self._screen.session.busy:
            self._screen.action_stop()
        self._screen.prompt.focus()
