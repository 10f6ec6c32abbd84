"""Reads one tool call: its name, and its arguments as they come."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from ziggurat.runtime.server.tools.scan import NotJSONError, ObjectScanner

_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset(("name", "id", "type", "function", *_ARGUMENTS))


class NoCallError(ValueError):
    """What is read is no call of a known function."""


class CallReader:
    """A call as a JSON object: ``{"name": …, "arguments": {…}}``, the keys in any order.

    As models also write it: with ``parameters``, with the arguments as text, with ``function`` for the name or around
    both, with an ``id`` and a ``type``.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.name: str | None = None
        self._names = names
        self._scanner = ObjectScanner()
        self._keys: set[str] = set()
        self._text: list[str] = []
        self._value = 0  # where the value that is being read begins
        self._arguments: tuple[int, int] | None = None
        self._streams = False

    @property
    def done(self) -> bool:
        """Whether the object is read to its end."""
        return self._scanner.done

    def feed(self, character: str) -> str:
        """Take a character, and return it when it is of the arguments of a function whose name is known.

        Raises NoCallError as soon as it can be no call.
        """
        scanner = self._scanner
        n_keys, within = scanner.n_keys, scanner.in_value
        try:
            scanner.feed(character)
        except NotJSONError:
            raise NoCallError from None
        self._text.append(character)
        if scanner.n_keys != n_keys:
            self._check_key()
        if scanner.in_value and not within:
            self._value = len(self._text) - 1
            self._streams = scanner.key in _ARGUMENTS and character == "{" and self.name is not None
        given = character if self._streams else ""
        if within and not scanner.in_value:
            self._streams = False
            self._end_of_value()
        return given

    def _check_key(self) -> None:
        key = self._scanner.key
        twice = key in self._keys or (key in _ARGUMENTS and not self._keys.isdisjoint(_ARGUMENTS))
        if key not in _KEYS or twice:
            raise NoCallError
        self._keys.add(key)

    def _end_of_value(self) -> None:
        key, begin = self._scanner.key, self._value
        if key in _ARGUMENTS:
            if self._text[begin] not in '{"n':
                raise NoCallError
            self._arguments = (begin, len(self._text))
        elif key == "name" or (key == "function" and self._text[begin] != "{"):
            if self.name is not None or self._text[begin] != '"':
                raise NoCallError
            self.name = self._known(_parsed("".join(self._text[begin:])))

    def _known(self, name: object) -> str:
        if not isinstance(name, str) or name not in self._names:
            raise NoCallError
        return name

    def finished(self) -> tuple[str, str]:
        """Return the name and the arguments (a JSON object's text). Raises NoCallError."""
        if self.name is None:
            function = _parsed("".join(self._text))["function"] if "function" in self._keys else None
            if not isinstance(function, dict):
                raise NoCallError
            inner: object = next((function[key] for key in _ARGUMENTS if key in function), {})
            return self._known(function.get("name")), _as_object(inner)
        if self._arguments is None:
            return self.name, "{}"
        text = "".join(self._text[slice(*self._arguments)])
        return self.name, text if text[0] == "{" else _as_object(_parsed(text))


class NamedReader:
    """A call whose name was read already: an object, which is its arguments."""

    def __init__(self, name: str) -> None:
        self.name: str | None = name
        self._scanner = ObjectScanner()
        self._text: list[str] = []

    @property
    def done(self) -> bool:
        """Whether the object is read to its end."""
        return self._scanner.done

    def feed(self, character: str) -> str:
        """Take a character and return it. Raises NoCallError as soon as it can be no JSON object."""
        try:
            self._scanner.feed(character)
        except NotJSONError:
            raise NoCallError from None
        self._text.append(character)
        return character

    def finished(self) -> tuple[str, str]:
        """Return the name and the arguments."""
        assert self.name is not None
        return self.name, "".join(self._text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NoCallError from None


def _as_object(arguments: object) -> str:
    """Return arguments as text; models write them as text themselves, or null for none."""
    if arguments is None:
        return "{}"
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    if not isinstance(arguments, dict):
        raise NoCallError
    return json.dumps(arguments)
