"""What slash commands do on the chat screen."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.tui.backend import BackendError
from ziggurat.tui.commands import CommandError, Completion, complete, parse
from ziggurat.tui.conversation import Conversation
from ziggurat.tui.export import ExportError, export
from ziggurat.tui.files import AttachError, read_attachment
from ziggurat.tui.screens.loader import with_budget
from ziggurat.tui.settings import write_commented
from ziggurat.tui.widgets.background import background

if TYPE_CHECKING:
    from ziggurat.tui.screens.chat import ChatScreen


class Commands:
    """Completes and runs them."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen

    def complete(self, text: str) -> Sequence[Completion]:
        """Return what a command may go on with."""
        return complete(text, {"theme": lambda: sorted(self._screen.app.available_themes)})

    def run(self, text: str) -> bool | None:
        """Run a command; True when it is done, False if it stays in the prompt, None for a text that is none."""
        try:
            found = parse(text)
        except CommandError as error:
            self._screen.banner.say(str(error), "error", "command")
            return False
        if found is None:
            return None
        self._screen.banner.clear("command")
        command, argument = found
        do = getattr(self, f"_{command.name}")
        if inspect.iscoroutinefunction(do):
            background(self._screen, do, argument)
            return True
        return do(argument) is not False

    def _idle(self) -> bool:
        if self._screen.session.busy:
            self._screen.notify("An answer runs: Esc stops it.")
            return False
        return True

    def _help(self, _: str) -> None:
        self._screen.app.action_help()  # type: ignore[attr-defined]

    def _new(self, _: str) -> bool:
        if not self._idle():
            return False
        self._screen.chats.begin(Conversation(system=self._screen.parts.settings.system))
        return True

    async def _file(self, argument: str) -> None:
        screen = self._screen
        try:
            attachment = await asyncio.to_thread(read_attachment, argument)
        except AttachError as error:
            screen.banner.say(str(error), "error", "file")
            return
        if screen.session.backend is not None:
            with contextlib.suppress(BackendError):
                attachment = replace(attachment, tokens=await screen.session.backend.count(attachment.text))
        screen.banner.clear("file")
        screen.set_attachments([*screen.attachments, attachment])

    def _system(self, argument: str) -> None:
        screen = self._screen
        if argument:
            screen.session.set_system("" if argument == "-" else argument)
            screen.show_title()
        said = screen.session.conversation.system
        screen.notify(f"System prompt: {said}" if said else "There is no system prompt")

    def _temp(self, argument: str) -> bool:
        session = self._screen.session
        try:
            value = float(argument) if argument else None
        except ValueError:
            value = -1.0
        if value is not None and not 0 <= value <= 5:
            self._screen.notify(f"{argument!r} is not a temperature: write a number from 0 to 5", severity="warning")
            return False
        session.sampling = replace(session.sampling, temperature=value)
        self._screen.notify("Temperature: " + ("as the server has it" if value is None else f"{value:g}"))
        return True

    def _budget(self, argument: str) -> bool:
        screen = self._screen
        if not argument:
            if not screen.kv_panel.display:
                screen.action_kv()
            return True
        if screen.loader.current is None:
            screen.notify("The budget is set where the server was started, by --kv-budget", severity="warning")
            return False
        budget, _, policy = argument.partition(" ")
        budget = "" if budget in ("none", "off") else budget
        screen.loader.start(with_budget(screen.loader.current, budget, policy.strip()))
        return True

    def _model(self, argument: str) -> None:
        self._screen.app.action_models(argument)  # type: ignore[attr-defined]

    def _chats(self, argument: str) -> None:
        self._screen.app.action_sessions(argument)  # type: ignore[attr-defined]

    def _rename(self, argument: str) -> bool:
        if argument:
            self._screen.session.rename(argument)
        return bool(argument)

    def _export(self, argument: str) -> bool:
        kind, _, path = argument.partition(" ")
        try:
            written = export(self._screen.session.conversation, kind, path)
        except ExportError as error:
            self._screen.banner.say(str(error), "error", "command")
            return False
        self._screen.notify(f"Written to {written}")
        return True

    def _config(self, _: str) -> bool:
        path = self._screen.parts.settings_file
        if path is None:
            self._screen.notify("There is no settings file here", severity="warning")
            return True
        try:
            made = write_commented(path)
        except InvalidRequestError as error:
            self._screen.banner.say(str(error), "error", "command")
            return False
        self._screen.notify(f"{path}: {'written' if made else 'is there already'}", timeout=10)
        return True

    async def _save(self, _: str) -> None:
        session = self._screen.session
        try:
            done = session.backend is not None and await session.backend.save(session.conversation.id)
        except BackendError as error:
            self._screen.notify(str(error), severity="error")
            return
        self._screen.notify("The model's rows are kept" if done else "This server cannot keep its rows", timeout=3)

    def _again(self, _: str) -> None:
        self._screen.action_again()

    def _reread(self, argument: str) -> bool:
        if argument not in ("on", "off"):
            return False
        self._screen.session.reread = argument == "on"
        self._screen.notify(f"The whole chat is {'' if argument == 'on' else 'not '}read again at each turn")
        return True

    def _theme(self, argument: str) -> bool:
        if argument not in self._screen.app.available_themes:
            self._screen.notify(f"There is no theme {argument!r}", severity="warning")
            return False
        self._screen.app.theme = argument
        return True

    async def _quit(self, _: str) -> None:
        await self._screen.app.action_quit()
