"""What slash commands do on the chat screen."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ziggurat.tui.backend import BackendError
from ziggurat.tui.conversation import Attachment, Conversation
from ziggurat.tui.screens.loader import with_budget
from ziggurat.tui.widgets.prompt import Completion

if TYPE_CHECKING:
    from ziggurat.tui.screens.chat import ChatScreen

#: Bytes of a file above which it is not attached.
LARGEST_FILE = 4 << 20


@dataclass(frozen=True)
class Command:
    """A slash command as it is listed."""

    name: str
    arguments: str
    help: str


COMMANDS = (
    Command("help", "", "keys and commands"),
    Command("new", "", "begin another chat"),
    Command("file", "PATH", "attach a text file to the next message"),
    Command("system", "[TEXT]", "set the system prompt; without a text show it, - removes it"),
    Command("temp", "X", "temperature of the next answers, 0 takes the likeliest token"),
    Command("budget", "[ROWS|N%|none] [POLICY]", "KV rows that are kept; without a number open the KV view"),
    Command("model", "[NAME]", "choose a model"),
    Command("chats", "[WORDS]", "earlier chats, searched in all their text"),
    Command("rename", "TITLE", "give this chat a title"),
    Command("export", "md|json [PATH]", "write this chat to a file"),
    Command("save", "", "keep the model's rows of this chat on disk"),
    Command("again", "", "answer the last message again"),
    Command("reread", "on|off", "read the whole chat again at each turn"),
    Command("theme", "NAME", "colours"),
    Command("quit", "", "leave"),
)


class Commands:
    """Completes and runs them."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen

    def complete(self, text: str) -> Sequence[Completion]:
        """Return what a command may go on with."""
        name, space, argument = text[1:].partition(" ")
        if not space:
            return [
                Completion(f"/{each.name} " if each.arguments else f"/{each.name}", f"/{each.name} {each.arguments}", each.help)
                for each in COMMANDS
                if each.name.startswith(name)
            ]
        return [Completion(f"/{name} {each}", each) for each in self._values(name, argument)]

    def _values(self, name: str, argument: str) -> list[str]:
        if name == "file":
            return _paths(argument)
        values: dict[str, Callable[[], list[str]]] = {
            "theme": lambda: sorted(self._screen.app.available_themes),
            "export": lambda: ["md", "json"],
            "reread": lambda: ["on", "off"],
        }
        return [each for each in values.get(name, list)() if each.startswith(argument)]

    def meant(self, text: str) -> bool:
        """Whether a text is a command, and not one that begins with a path or such."""
        return re.match(r"/[A-Za-z]+(\s|$)", text) is not None

    def run(self, text: str) -> bool:
        """Run a command; False if it is not to leave the prompt."""
        name, _, argument = text[1:].strip().partition(" ")
        found = [each for each in COMMANDS if each.name == name] or [
            each for each in COMMANDS if name and each.name.startswith(name)
        ]
        if len(found) != 1:
            self._screen.notify(f"There is no command /{name}: /help lists them", severity="warning")
            return False
        result = getattr(self, f"_{found[0].name}")(argument.strip())
        if inspect.isawaitable(result):
            self._screen.run_worker(result)  # type: ignore[arg-type]
            return True
        return result is not False

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
        self._screen.begin(Conversation())
        return True

    async def _file(self, argument: str) -> None:
        screen = self._screen
        path = Path(argument.strip("'\"")).expanduser()
        try:
            text = await asyncio.to_thread(_read, path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            screen.notify(f"{path}: {reason}", severity="error", title="Not attached")
            return
        tokens = None
        if screen.session.backend is not None:
            try:
                tokens = await screen.session.backend.count(text)
            except BackendError:
                tokens = None
        screen.set_attachments([*screen.attachments, Attachment(path.name, text, tokens)])

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

    def _export(self, argument: str) -> Any:
        kind, _, path = argument.partition(" ")
        return self._screen.app.export(kind, path.strip())  # type: ignore[attr-defined]

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


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size} bytes, which is too much to attach")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not text") from None


def _paths(argument: str) -> list[str]:
    """Return files and folders that a path may go on with."""
    typed = Path(argument).expanduser() if argument else Path()
    folder, start = (typed, "") if argument.endswith("/") or not argument else (typed.parent, typed.name)
    try:
        names = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError:
        return []
    found = [path for path in names if path.name.startswith(start) and (start or not path.name.startswith("."))]
    prefix = argument[: len(argument) - len(start)] if start else argument
    return [f"{prefix}{path.name}{'/' if path.is_dir() else ''}" for path in found[:50]]
