"""The app: its screens, themes and commands of the palette."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from rich.console import RenderableType
from rich.text import Text
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from ziggurat.tui.backend import BackendError
from ziggurat.tui.ends import Ends
from ziggurat.tui.parts import ChatParts
from ziggurat.tui.screens.chat import ChatScreen
from ziggurat.tui.screens.help import HelpScreen
from ziggurat.tui.screens.models import ModelsScreen
from ziggurat.tui.screens.sessions import SessionsScreen
from ziggurat.tui.themes import THEMES

_logger = logging.getLogger(__name__)


class ChatApp(App[None]):
    """Talks to a model in a terminal."""

    TITLE = "ziggurat"
    CSS_PATH = "ziggurat.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", priority=True),
        Binding("ctrl+c", "copy_or_hint", show=False),
    ]

    def __init__(self, parts: ChatParts) -> None:
        super().__init__()
        self.parts = parts
        for theme in THEMES:
            self.register_theme(theme)
        chosen = parts.settings.theme
        self.theme = chosen if chosen in self.available_themes else THEMES[0].name
        self.chat = ChatScreen(parts)
        self._quitting = False
        self._ends = Ends(self, self._quit)

    def on_mount(self) -> None:
        """Show the chat, and end in order when told to by a signal."""
        self.push_screen(self.chat)
        self._ends.listen()

    def on_unmount(self) -> None:
        """Leave signals alone."""
        self._ends.forget()

    def panic(self, *renderables: RenderableType) -> None:
        """End with what is said; or in order, if nobody can read it because the terminal is gone."""
        if not self._ends.terminal_gone():
            super().panic(*renderables)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Add what the chat can do to the palette."""
        yield from super().get_system_commands(screen)
        yield SystemCommand("Chats", "Earlier chats, searched in all their text", self.action_sessions)
        yield SystemCommand("Models", "Choose a model of this machine", self.action_models)
        yield SystemCommand("New chat", "Begin another chat", self.chat.action_new)
        yield SystemCommand("KV view", "What the model still remembers; its budget", self.chat.action_kv)
        yield SystemCommand("Answer again", "Answer the last message again", self.chat.action_again)
        yield SystemCommand("Keys and commands", "What one can press and type", self.action_help)

    def action_help(self) -> None:
        """Show keys and commands."""
        self.push_screen(HelpScreen())

    def action_copy_or_hint(self) -> None:
        """Copy what is selected; else say how one leaves."""
        text = self.screen.get_selected_text()
        if text:
            self.copy_to_clipboard(text)
            self.notify(f"Copied {len(text)} characters")
        else:
            self.notify("Ctrl+Q quits, Esc stops an answer")

    def action_models(self, query: str = "") -> None:
        """Choose a model."""
        loader = self.chat.loader
        if loader.host is None:
            self.notify("This chat is connected to a server, which chooses its model", severity="warning")
            return
        current = loader.current.path if loader.current is not None and self.chat.session.backend is not None else None

        def chosen(path: Path | None) -> None:
            if path is not None:
                current = loader.current
                loader.start(replace(current, path=path) if current is not None else self.parts.settings.setup(path))

        self.push_screen(ModelsScreen(loader.host, current, query), chosen)

    def action_sessions(self, query: str = "") -> None:
        """Choose an earlier chat."""
        if self.parts.store is None:
            self.notify("Chats are not kept", severity="warning")
            return
        store, session = self.parts.store, self.chat.session

        def chosen(name: str | None) -> None:
            if name is not None:
                self.chat.chats.open(name)
            else:
                self.chat.chats.retitle()

        self.push_screen(SessionsScreen(store, session.conversation.id, query, now=session.now), chosen)

    def _fatal_error(self) -> None:
        """End with a line instead of a traceback; the log has that."""
        error = self._exception
        _logger.error("the chat failed", exc_info=error)
        where = f"; its log is {self.parts.log_file}" if self.parts.log_file is not None else ""
        self.panic(Text(f"Error: the chat failed ({error!r}){where}. Chats are kept: --continue goes on"))

    async def action_quit(self) -> None:
        """End what runs, keep the model's rows where that is possible, and leave."""
        await self._quit(0)

    async def _quit(self, code: int) -> None:
        if self._quitting:
            return
        self._quitting = True
        session, host = self.chat.session, self.parts.host
        self.chat.loader.cancel()
        with contextlib.suppress(BackendError, asyncio.TimeoutError):
            await asyncio.wait_for(session.stop(), 2)
        backend = session.backend
        if backend is not None:
            with contextlib.suppress(BackendError, asyncio.TimeoutError):
                if session.conversation.messages:
                    await asyncio.wait_for(backend.save(session.conversation.id), 5)
            with contextlib.suppress(BackendError, asyncio.TimeoutError):
                await asyncio.wait_for(backend.close(), 5)
        if host is not None:
            with contextlib.suppress(BackendError, asyncio.TimeoutError):
                await asyncio.wait_for(host.close(), 5)
        self.exit(return_code=code)
