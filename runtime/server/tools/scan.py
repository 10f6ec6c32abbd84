"""Follows a JSON object character by character, and says at once when it can be none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_BLANKS = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_NUMBER_CHARACTERS = frozenset("+-.eE0123456789")
_LITERALS = ("true", "false", "null")
_MAX_DEPTH = 100
_CLOSES = {"}": "{", "]": "["}


class NotJSONError(ValueError):
    """A character that no JSON object has here."""


class ObjectScanner:
    """Reads one JSON object (RFC 8259) from its opening brace on.

    ``key`` is the last name of the object's own members that was read, the ``n_keys``-th; ``in_value`` tells whether a
    value of one is begun and not ended, and ``done`` whether the object is. A number ends with the character after it.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self.n_keys = 0
        self.done = False
        self._open: list[str] = []
        self._next: Callable[[str], None] = self._start
        self._scalar = self._is_key = False
        self._token: list[str] = []  # of a number, a literal, or a name of the object's own members
        self._hex = 0

    @property
    def in_value(self) -> bool:
        """Whether a member's value is being read."""
        return len(self._open) > 1 or self._scalar

    def feed(self, character: str) -> None:
        """Take the next character. Raises NotJSONError, after which nothing more may be fed."""
        self._next(character)

    def _start(self, character: str) -> None:
        if character != "{":
            raise NotJSONError
        self._push(character)

    def _push(self, character: str) -> None:
        if len(self._open) == _MAX_DEPTH:
            raise NotJSONError
        self._open.append(character)
        self._next = self._first_key if character == "{" else self._first_item

    def _pop(self, character: str) -> None:
        if self._open.pop() != _CLOSES[character]:
            raise NotJSONError
        self._next = self._after
        if not self._open:
            self.done, self._next = True, self._start

    def _first_key(self, character: str) -> None:
        if character == "}":
            self._pop(character)
        else:
            self._member(character)

    def _member(self, character: str) -> None:
        if character == '"':
            self._is_key, self._token, self._next = True, [], self._string
        elif character not in _BLANKS:
            raise NotJSONError

    def _colon(self, character: str) -> None:
        if character == ":":
            self._next = self._value
        elif character not in _BLANKS:
            raise NotJSONError

    def _first_item(self, character: str) -> None:
        if character == "]":
            self._pop(character)
        else:
            self._value(character)

    def _value(self, character: str) -> None:
        if character in _BLANKS:
            return
        if character in "{[":
            self._push(character)
            return
        self._scalar, self._token = True, [character]
        if character == '"':
            self._next = self._string
        elif character in "-0123456789":
            self._next = self._number
        elif character in "tfn":
            self._next = self._literal
        else:
            raise NotJSONError

    def _after(self, character: str) -> None:
        if character == ",":
            self._next = self._member if self._open[-1] == "{" else self._value
        elif character in _CLOSES:
            self._pop(character)
        elif character not in _BLANKS:
            raise NotJSONError

    def _number(self, character: str) -> None:
        if character in _NUMBER_CHARACTERS:
            self._token.append(character)
            return
        if not _NUMBER.fullmatch("".join(self._token)):
            raise NotJSONError
        self._scalar, self._next = False, self._after
        self._after(character)

    def _literal(self, character: str) -> None:
        self._token.append(character)
        text = "".join(self._token)
        if text in _LITERALS:
            self._scalar, self._next = False, self._after
        elif not any(literal.startswith(text) for literal in _LITERALS):
            raise NotJSONError

    def _string(self, character: str) -> None:
        if character == '"':
            self._end_string()
            return
        if character < " ":
            raise NotJSONError
        if self._is_key and len(self._open) == 1:
            self._token.append(character)
        if character == "\\":
            self._next = self._escape

    def _escape(self, character: str) -> None:
        if character not in '"\\/bfnrtu':
            raise NotJSONError
        if self._is_key:
            self._token.append(character)
        self._hex = 4
        self._next = self._unicode if character == "u" else self._string

    def _unicode(self, character: str) -> None:
        if character not in "0123456789abcdefABCDEF":
            raise NotJSONError
        if self._is_key:
            self._token.append(character)
        self._hex -= 1
        if not self._hex:
            self._next = self._string

    def _end_string(self) -> None:
        if not self._is_key:
            self._scalar, self._next = False, self._after
            return
        if len(self._open) == 1:
            self.key = json.loads(f'"{"".join(self._token)}"')
            self.n_keys += 1
        self._is_key, self._next = False, self._colon
