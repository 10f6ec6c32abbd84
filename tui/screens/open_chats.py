"""Going from one chat to another, and the model's rows with it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ziggurat.tui.backend import BackendError
from ziggurat.tui.conversation import Conversation
from ziggurat.tui.session_events import RecordError
from ziggurat.tui.widgets.background import background

if TYPE_CHECKING:
    from ziggurat.tui.screens.chat import ChatScreen


class OpenChats:
    """Opens chats on a screen."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self._session, self._store = screen.session, screen.parts.store

    def inputs(self) -> list[str]:
        """Return what was typed in all chats, the latest last."""
        with contextlib.suppress(RecordError):
            return list(self._store.inputs())[::-1] if self._store is not None else []
        return []

    def open(self, name: str) -> None:
        """Go on with an earlier chat."""
        if name == self._session.conversation.id:
            self.retitle()
        elif self._session.busy:
            self._screen.notify("An answer runs: Esc stops it.")
        elif self._store is not None:
            try:
                self.begin(self._store.open(name))
            except RecordError as error:
                self._screen.notify(str(error), severity="error")

    def begin(self, conversation: Conversation) -> None:
        """Go on with a conversation; the model's rows of the old one are kept, those of this one taken up."""
        old = self._session.conversation
        self._screen.actions.leave()
        self._screen.banner.clear()
        self._session.open(conversation)
        self._screen.prompt.focus()
        self.change_rows(old)

    def change_rows(self, old: Conversation | None = None) -> None:
        """Have the model's rows of a conversation kept on disk, and those of the one that is open taken up."""
        background(self._screen, self._change_rows, old, group="rows", exclusive=True)

    async def _change_rows(self, old: Conversation | None) -> None:
        backend, conversation = self._session.backend, self._session.conversation
        if backend is None:
            return
        with contextlib.suppress(BackendError):  # without them the chat is read again
            if old is not None and old.messages:
                await backend.save(old.id)
            if conversation.messages and not self._session.busy:
                await backend.restore(conversation.id)
        self._screen.kv_panel.refresh_kept()

    def retitle(self) -> None:
        """Take the title that the store has: it may have been changed in the list."""
        conversation = self._session.conversation
        with contextlib.suppress(RecordError):
            if self._store is not None and conversation.messages:
                conversation.title = self._store.open(conversation.id).title
        self._screen.show_title()
