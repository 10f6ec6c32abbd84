"""Settings of the chat: a TOML file, and options of the command that count before it."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.options import CACHE_TYPES, KV_POLICIES
from ziggurat.tui.backend import ModelSetup, Sampling

Check = Callable[[Any], Any]


@dataclass(frozen=True)
class Settings:
    """What can be chosen. None leaves it to the server. Paths have no ``~`` any more.

    ``models`` are folders that are looked through for GGUFs; ``save`` keeps conversations; ``reread`` has the whole
    conversation read at each turn.
    """

    model: Path | None = None
    connect: str | None = None
    api_key: str | None = None
    models: tuple[Path, ...] = ()
    system: str = ""
    theme: str | None = None
    save: bool = True
    reread: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    ctx: int | None = None
    kv_budget: str | None = None
    kv_policy: str | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    gpu_layers: int | None = None
    threads: int | None = None

    def sampling(self) -> Sampling:
        """Return how answers are sampled."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.seed, self.max_tokens)

    def setup(self, model: Path) -> ModelSetup:
        """Return what a model of this machine is run with."""
        shared = {field.name for field in fields(ModelSetup)} & {field.name for field in fields(self)}
        return ModelSetup(model, **{name: getattr(self, name) for name in shared})


@dataclass(frozen=True)
class Key:
    """A key of the file: what it takes, an example, what it is for, and what makes a value of what stands there."""

    takes: str
    example: str
    about: str
    check: Check


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError
    return Path(value).expanduser()


def _paths(value: Any) -> tuple[Path, ...]:
    return tuple(map(_path, [value] if isinstance(value, str) else _list(value)))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value


def _budget(value: Any) -> str:
    """Accept rows as a number as well."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    from ziggurat.runtime.budget import parse_budget

    try:
        parse_budget(text)
    except InvalidRequestError:
        raise ValueError from None
    return text


def _number(low: float, high: float, kind: type[int] | type[float] = float) -> Check:
    def check(value: Any) -> Any:
        fits = isinstance(value, int) if kind is int else isinstance(value, int | float)
        if not fits or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return kind(value)

    return check


def _one_of(*names: str) -> Check:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return check


_MANY = 2**31 - 1
KEYS: Mapping[str, Key] = {
    "model": Key("a path", '"~/models/model.gguf"', "opened when none is named", _path),
    "connect": Key("an address", '"http://127.0.0.1:8080/v1"', "server to talk to when no model is named", _text),
    "api_key": Key("a text", '"..."', "for that server; ZIGGURAT_API_KEY in the environment counts before", _text),
    "models": Key("a list of folders", '["~/models"]', "looked through for GGUFs", _paths),
    "system": Key("a text", '"Answer briefly."', "system prompt of new chats", _text),
    "theme": Key("a name", '"textual-light"', "colours; /theme lists them", _text),
    "save": Key("true or false", "true", "keep chats", _flag),
    "reread": Key("true or false", "false", "read the whole chat at each turn, not only what is new", _flag),
    "temperature": Key("a number from 0 to 5", "0.8", "0 takes the likeliest token", _number(0, 5)),
    "top_p": Key("a number from 0 to 1", "0.95", "tokens of so much probability", _number(0, 1)),
    "top_k": Key("a whole number from 0", "40", "so many of the likeliest tokens, 0 for all", _number(0, _MANY, int)),
    "min_p": Key("a number from 0 to 1", "0.05", "tokens of at least this part of the likeliest's", _number(0, 1)),
    "seed": Key("a whole number", "1", "the same answers each time", _number(-_MANY, _MANY, int)),
    "max_tokens": Key("a whole number from 1", "1024", "of an answer", _number(1, _MANY, int)),
    "ctx": Key("a whole number from 1", "8192", "tokens of a conversation", _number(1, _MANY, int)),
    "kv_budget": Key('rows or a part, such as "10%"', '"25%"', "KV rows that are kept of a prompt", _budget),
    "kv_policy": Key(f"one of {', '.join(KV_POLICIES)}", '"pyramid"', "which rows are kept", _one_of(*KV_POLICIES)),
    "cache_type_k": Key(f"one of {', '.join(CACHE_TYPES)}", '"f16"', "type of K rows", _one_of(*CACHE_TYPES)),
    "cache_type_v": Key(f"one of {', '.join(CACHE_TYPES)}", '"f16"', "type of V rows", _one_of(*CACHE_TYPES)),
    "gpu_layers": Key("a whole number from 0", "99", "layers on the GPU", _number(0, _MANY, int)),
    "threads": Key("a whole number from 1 to 1024", "8", "CPU threads", _number(1, 1024, int)),
}


def read_settings(path: Path, given: Mapping[str, Any] | None = None, *, must_exist: bool = False) -> Settings:
    """Read the file and put ``given`` values, where they are not None, in place of its own.

    A file that is not there is empty, unless it ``must_exist``. Raises InvalidRequestError, with the line of the key.
    """
    values = _read(path, must_exist=must_exist)
    values |= {name: value for name, value in (given or {}).items() if value is not None}
    return Settings(**values)


def _read(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        # tomli is the same under another name, for older Pythons
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        data: dict[str, Any] = toml.loads(text)
    except FileNotFoundError:
        if must_exist:
            raise InvalidRequestError(f"{path}: no such file; --write-config makes one") from None
        return {}
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # TOML or UTF-8
        raise InvalidRequestError(f"{path}: is not TOML ({error})") from None
    return {name: _value(path, text, name, value) for name, value in data.items()}


def _value(path: Path, text: str, name: str, value: Any) -> Any:
    where = f"{path}:{_line(text, name)}"
    key = KEYS.get(name)
    if key is None:
        near = difflib.get_close_matches(name, KEYS, 1)
        raise InvalidRequestError(f"{where}: there is no key {name}: {_advice(near)}")
    try:
        return key.check(value)
    except ValueError:
        raise InvalidRequestError(f"{where}: {name} takes {key.takes}, such as {key.example}") from None


def _advice(near: list[str]) -> str:
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(KEYS)}"


def _line(text: str, name: str) -> int:
    """Return the line of a key or a table."""
    place = re.compile(rf"\s*\[*\s*[\"']?{re.escape(name)}[\"']?\s*[=.\]]")
    return next((number for number, line in enumerate(text.splitlines(), 1) if place.match(line)), 1)


def commented() -> str:
    """Return a file with all keys, none of them in force."""
    lines = ["# Settings of `ziggurat chat`. Options of the command count before them.", ""]
    for name, key in KEYS.items():
        lines += [f"# {key.about} ({key.takes})", f"# {name} = {key.example}", ""]
    return "\n".join(lines)


def write_commented(path: Path) -> bool:
    """Write that file where there is none, readable for the owner only; False if there is one.

    Raises InvalidRequestError.
    """
    if path.exists():
        return False
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # it may hold a key
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be written ({error.strerror or error})") from None
    with open(handle, "w", encoding="utf-8") as file:
        file.write(commented())
    return True
