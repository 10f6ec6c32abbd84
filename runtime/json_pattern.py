r"""Turns a regular expression of a JSON schema into a grammar (GBNF) for the inside of a JSON string.

What is made matches as a whole, also where the expression has no anchors. Supported: characters, escapes, ``.``, sets,
``\d \w \s`` and their opposites, groups, ``|``, ``* + ?`` and ``{m,n}``; ``^`` and ``$`` at the ends only. Not
supported, and refused: looking around, references back, ``\b``, ``\p``. Lazy quantifiers match the same texts.
"""

from __future__ import annotations

import re

from ziggurat.runtime.json_rules import alternatives, literal, repeated

_Ranges = list[tuple[int, int]]

_LAST = 0x10FFFF
_DIGITS: _Ranges = [(0x30, 0x39)]
_WORD: _Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACE: _Ranges = [
    (9, 13), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
    (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
]  # fmt: skip
_LINE_ENDS: _Ranges = [(10, 10), (13, 13), (0x2028, 0x2029)]
_SETS = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_ONE = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "0": 0}
#: What may stand in a JSON string as it is, and how the rest is spelled; other control characters are left out.
_PLAIN: _Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0x80, 0xD7FF), (0xE000, _LAST)]
_SPELLED = {0x22: '\\"', 0x5C: "\\\\", 8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r"}
_QUANTIFIER = re.compile(r"([*+?])|\{(\d{1,6})(?:(,)(\d{0,6}))?\}")
_MAX_DEPTH = 40


def pattern_rule(pattern: str) -> str:
    """Return an expression of the grammar. Raises ValueError saying what is not supported or wrong."""
    reader = _Reader(pattern)
    rule = reader.alternatives()
    if reader.at < len(pattern):
        raise ValueError("a parenthesis is closed that was not opened")
    return f"({rule})"


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._depth = 0
        self.at = 0

    def _peek(self, length: int = 1) -> str:
        return self._pattern[self.at : self.at + length]

    def _next(self, what: str) -> str:
        if self.at == len(self._pattern):
            raise ValueError(f"it ends within {what}")
        self.at += 1
        return self._pattern[self.at - 1]

    def alternatives(self) -> str:
        found = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            found.append(self._sequence())
        return alternatives(found)

    def _sequence(self) -> str:
        top = self._depth == 0
        if top and self._peek() == "^":
            self.at += 1
        parts: list[str] = []
        while (character := self._peek()) and character not in "|)":
            if character == "$" and top and self._peek(2) in ("$", "$|"):
                self.at += 1
                break
            parts.append(self._quantified())
        return " ".join(parts) if parts else '""'

    def _quantified(self) -> str:
        if _QUANTIFIER.match(self._pattern, self.at):
            raise ValueError(f"there is nothing to repeat before {self._peek()!r}")
        item = self._item()
        match = _QUANTIFIER.match(self._pattern, self.at)
        if match is None:
            return item
        self.at = match.end()
        if self._peek() == "?":
            self.at += 1
        if _QUANTIFIER.match(self._pattern, self.at):
            raise ValueError(f"a repetition of a repetition at character {self.at}")
        if match[1]:
            return f"({item}){match[1]}"
        low = int(match[2])
        high = low if match[3] is None else int(match[4]) if match[4] else None
        return repeated(f"({item})", low, high) or '""'

    def _item(self) -> str:
        character = self._next("a group")
        if character == "(":
            return self._group()
        if character == "[":
            return _spell(self._set())
        if character == ".":
            return _spell(_opposite(_LINE_ENDS))
        if character == "\\":
            return _spell(self._escape(within_set=False))
        if character in "^$":
            raise ValueError(f"{character!r} is supported at the ends only")
        return _spell([(ord(character), ord(character))])

    def _group(self) -> str:
        if self._peek() == "?":
            if self._peek(2) != "?:":
                raise ValueError("looking around and named groups are not supported")
            self.at += 2
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"groups are nested more than {_MAX_DEPTH} deep")
        inner = self.alternatives()
        self._depth -= 1
        if self._next("a group") != ")":
            raise ValueError("a group is not closed")
        return f"({inner})"

    def _set(self) -> _Ranges:
        negated = self._peek() == "^"
        self.at += negated
        ranges: _Ranges = []
        while (character := self._next("a set")) != "]":
            low = self._escape(within_set=True) if character == "\\" else [(ord(character), ord(character))]
            if self._peek() == "-" and self._peek(2) != "-]":
                self.at += 1
                character = self._next("a set")
                high = self._escape(within_set=True) if character == "\\" else [(ord(character), ord(character))]
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] < low[0][0]:
                    raise ValueError("a range in a set is wrong")
                low = [(low[0][0], high[0][1])]
            ranges += low
        return _opposite(ranges) if negated else ranges

    def _escape(self, *, within_set: bool) -> _Ranges:
        character = self._next("an escape")
        if character.lower() in _SETS:
            ranges = _SETS[character.lower()]
            return ranges if character.islower() else _opposite(ranges)
        if character in "xu":
            digits = self._pattern[self.at : self.at + (2 if character == "x" else 4)]
            if not re.fullmatch(r"[0-9a-fA-F]{2}" if character == "x" else r"[0-9a-fA-F]{4}", digits):
                raise ValueError(f"\\{character} needs {2 if character == 'x' else 4} hexadecimal digits")
            self.at += len(digits)
            return [(int(digits, 16), int(digits, 16))]
        if character == "b" and within_set:
            return [(8, 8)]
        if character in _ONE:
            return [(_ONE[character], _ONE[character])]
        if character.isalnum():
            raise ValueError(f"\\{character} is not supported")
        return [(ord(character), ord(character))]


def _opposite(ranges: _Ranges) -> _Ranges:
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, _LAST)] if start <= _LAST else found


def _spell(ranges: _Ranges) -> str:
    """Return an expression for one character of the ranges, as it is spelled in a JSON string."""
    plain = [
        (max(low, start), min(high, end))
        for low, high in sorted(ranges)
        for start, end in _PLAIN
        if max(low, start) <= min(high, end)
    ]
    spelled = [literal(text) for code, text in _SPELLED.items() if any(low <= code <= high for low, high in ranges)]
    if not plain and not spelled:
        raise ValueError("it asks for a character that JSON has no short spelling for")
    if len(plain) == 1 and plain[0][0] == plain[0][1] and not spelled:
        return literal(chr(plain[0][0]))
    found = ["[" + "".join(f"\\U{low:08X}-\\U{high:08X}" for low, high in plain) + "]"] if plain else []
    found += spelled
    return found[0] if len(found) == 1 else f"({alternatives(found)})"
