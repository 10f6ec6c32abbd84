"""Slash commands as data: what there is, what a text means, and how it can go on. What they do is the screen's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ziggurat.tui.files import paths


class CommandError(ValueError):
    """A text looks like a command and is none; the message says what to write."""


@dataclass(frozen=True)
class Command:
    """A command: its name without the slash, what follows it as it is shown in lists, and what it does."""

    name: str
    arguments: str
    help: str

    @property
    def needs_argument(self) -> bool:
        """Whether it does nothing without an argument."""
        return bool(self.arguments) and not self.arguments.startswith("[")


COMMANDS = (
    Command("help", "", "keys and commands"),
    Command("new", "", "begin another chat"),
    Command("file", "PATH", "attach a text file to the next message"),
    Command("system", "[TEXT|-]", "set the system prompt; without a text show it, - removes it"),
    Command("temp", "[X]", "temperature of the next answers: 0 takes the likeliest token, nothing the server's"),
    Command("budget", "[ROWS|N%|none] [POLICY]", "KV rows that are kept; without a number open the KV view"),
    Command("model", "[NAME]", "choose a model"),
    Command("chats", "[WORDS]", "earlier chats, searched in all their text"),
    Command("rename", "TITLE", "give this chat a title"),
    Command("export", "md|json [PATH]", "write this chat to a file"),
    Command("save", "", "keep the model's rows of this chat on disk"),
    Command("again", "", "answer the last message again"),
    Command("reread", "on|off", "read the whole chat again at each turn"),
    Command("config", "", "write the settings file, if there is none, and say where it is"),
    Command("theme", "NAME", "colours"),
    Command("quit", "", "leave"),
)

#: The first values of arguments that are the same in every chat.
VALUES: Mapping[str, tuple[str, ...]] = {
    "export": ("md", "json"),
    "reread": ("on", "off"),
    "budget": ("none", "10%", "25%", "50%"),
}
_POLICIES = ("pyramid", "snapkv", "streaming", "h2o", "tova", "keydiff")

# a path, such as /etc/hosts, is none
_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+|$)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Completion:
    """How a text can go on: what it becomes, what is shown for that, and a hint."""

    text: str
    shown: str
    hint: str = ""


def parse(text: str) -> tuple[Command, str] | None:
    """Return the command that a text is and its argument; None if it is none, but something to be said.

    A beginning that only one command has stands for it. Raises CommandError.
    """
    match = _COMMAND.fullmatch(text.strip())
    if match is None:
        return None
    name, argument = match[1].lower(), match[2].strip()
    found = [each for each in COMMANDS if each.name == name] or [
        each for each in COMMANDS if each.name.startswith(name)
    ]
    if not found:
        near = difflib.get_close_matches(name, [each.name for each in COMMANDS], 1)
        meant = f"did you mean /{near[0]}? " if near else ""
        raise CommandError(f"there is no command /{name}: {meant}/help lists them")
    if len(found) > 1:
        raise CommandError(f"/{name} could be {' or '.join(f'/{each.name}' for each in found)}")
    command = found[0]
    if command.needs_argument and not argument:
        raise CommandError(f"/{command.name} needs {command.arguments}: {command.help}")
    return command, argument


def complete(text: str, values: Mapping[str, Callable[[], Sequence[str]]] | None = None) -> list[Completion]:
    """Return how a text that begins with a slash can go on. ``values`` are further arguments by command."""
    if not text.startswith("/") or "\n" in text:
        return []
    name, space, argument = text[1:].partition(" ")
    if not space:
        return [_completion(each) for each in COMMANDS if each.name.startswith(name.lower())]
    return [Completion(f"/{name} {each}", each) for each in _values(name.lower(), argument.lstrip(), values or {})]


def _completion(command: Command) -> Completion:
    text = f"/{command.name} " if command.arguments else f"/{command.name}"
    return Completion(text, f"/{command.name} {command.arguments}".rstrip(), command.help)


def _values(name: str, argument: str, values: Mapping[str, Callable[[], Sequence[str]]]) -> list[str]:
    if name == "file":
        return paths(argument)
    if name == "export" and " " in argument:
        kind, _, path = argument.partition(" ")
        return [f"{kind} {each}" for each in paths(path.lstrip())]
    if name == "budget" and " " in argument:
        budget, _, policy = argument.partition(" ")
        return [f"{budget} {each}" for each in _POLICIES if each.startswith(policy.lstrip())]
    known = [*VALUES.get(name, ()), *(values[name]() if name in values else ())]
    return [each for each in known if each.casefold().startswith(argument.casefold()) and each != argument]
