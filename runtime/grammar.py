"""Reads grammars in llama.cpp's notation (GBNF) as the library does, before it does.

The library aborts the process, fills the memory or never returns on grammars that its parser lets through: a group in
a group in a group, ``x{5,2}``, hidden left recursion. So a grammar is read and checked here first, and what arrives
there is known to be harmless. What is stricter than the library: rules defined twice, empty or reversed character
ranges, and repetitions above 2000 (which it silently reads as "any number") are refused.

The notation is described in llama.cpp's ``grammars/README.md``; the limits are ours.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.grammar_check import Chars, Element, Ref, Rules, TokenItem, check

#: Bytes of a grammar's text, groups within groups, and elements after repetitions are written out, at most.
MAX_BYTES, MAX_DEPTH, MAX_ELEMENTS = 512 * 1024, 50, 200_000
#: The library's own limit: repetitions times the rules that one of them makes.
MAX_REPETITIONS = 2000

_NAME = re.compile(r"[a-zA-Z0-9-]+")
_NUMBER = re.compile(r"[0-9]{1,9}")
_TOKEN = re.compile(r"<(?:\[([0-9]{1,9})\]|[^>\0]*)>")
_BLANKS = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_ESCAPE = re.compile(r'\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([trn\\"\[\]-]))')
_PLAIN = {"t": "\t", "r": "\r", "n": "\n"}


@dataclass(frozen=True)
class Grammar:
    """A grammar that was read and is safe to give to the library; ``root`` is its start.

    ``tokens`` are the tokens it names, as ``<text>`` or as an id: a vocabulary has to have them.
    """

    text: str
    tokens: tuple[str | int, ...] = ()


@functools.lru_cache(maxsize=32)
def read_grammar(text: str) -> Grammar:
    """Check a grammar's text and return it. Raises InvalidRequestError saying what is wrong and where."""
    try:
        n_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise InvalidRequestError("the grammar is not valid Unicode") from None
    if n_bytes > MAX_BYTES:
        raise InvalidRequestError(f"the grammar has {n_bytes} bytes; at most {MAX_BYTES} are read")
    if "\0" in text:
        raise InvalidRequestError("the grammar contains a NUL character; write it as \\x00")
    reader = _Reader(text)
    reader.read()
    check(reader.finished(), "root")
    return Grammar(text, tuple(dict.fromkeys(reader.tokens)))


class _Reader:
    """One pass over the text. Rules are numbered in the order of the library, which limits by these numbers."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._numbers: dict[str, int] = {}
        self._rules: dict[int, list[list[Element]]] = {}
        self._depth = 0
        self._n_elements = 0
        self.tokens: list[str | int] = []

    def read(self) -> None:
        self._skip(_LINES)
        while self._at < len(self._text):
            self._rule()

    def finished(self) -> Rules:
        """Return the rules by number, and the names; refuse what is used and nowhere defined."""
        missing = [name for name, number in self._numbers.items() if number not in self._rules]
        if "root" not in self._numbers:
            raise InvalidRequestError("the grammar has no rule with the name root to begin with")
        if missing:
            raise InvalidRequestError(f"the grammar uses the rule {missing[0]}, which it does not define")
        names = list(self._numbers)
        return Rules([self._rules[number] for number in range(len(names))], names)

    def _fail(self, problem: str) -> InvalidRequestError:
        before = self._text[: self._at]
        line, column = before.count("\n") + 1, self._at - (before.rfind("\n") + 1) + 1
        return InvalidRequestError(f"the grammar is wrong in line {line}, column {column}: {problem}")

    def _skip(self, blanks: re.Pattern[str]) -> None:
        match = blanks.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _peek(self, length: int = 1) -> str:
        return self._text[self._at : self._at + length]

    def _take(self, pattern: re.Pattern[str], wanted: str) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise self._fail(f"{wanted} is missing")
        self._at = match.end()
        return match

    def _expect(self, literal: str) -> None:
        if not self._text.startswith(literal, self._at):
            raise self._fail(f"{literal!r} is missing")
        self._at += len(literal)

    def _number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers))

    def _new_number(self, base: str) -> int:
        return self._number(f"{base}_{len(self._numbers)}")  # names in the text have no underscore

    def _rule(self) -> None:
        name = self._take(_NAME, "the name of a rule (letters, digits and -)")[0]
        number = self._number(name)
        if number in self._rules:
            raise self._fail(f"the rule {name} is defined twice")
        self._skip(_BLANKS)
        self._expect("::=")
        self._skip(_LINES)
        self._rules[number] = self._alternatives(name, _BLANKS)
        if self._at < len(self._text) and self._peek() not in "\r\n":
            raise self._fail(f"{self._peek()!r} is not expected here")
        self._skip(_LINES)

    def _alternatives(self, name: str, blanks: re.Pattern[str]) -> list[list[Element]]:
        found = [self._sequence(name, blanks)]
        while self._peek() == "|":
            self._at += 1
            self._skip(_LINES)
            found.append(self._sequence(name, blanks))
        return found

    def _sequence(self, name: str, blanks: re.Pattern[str]) -> list[Element]:
        elements: list[Element] = []
        start, weight = 0, 1  # of the item before: its first element, and how many rules it made
        while character := self._peek():
            if character in "*+?{":
                low, high = self._repetition(blanks)
                if start == len(elements):
                    raise self._fail("there is nothing to repeat before this")
                weight = self._repeat(elements, start, low, high, weight, name)
                continue
            before = len(self._numbers)
            item = self._item(name)
            if item is None:
                break
            weight = max(1, len(self._numbers) - before) if character == "(" else 1
            start = len(elements)
            self._count(len(item))
            elements += item
            self._skip(blanks)
        return elements

    def _item(self, name: str) -> list[Element] | None:
        """Read a literal, a class, a token, a reference or a group; None when there is none."""
        character = self._peek()
        if character == '"':
            return self._literal()
        if character == "[":
            return [self._class()]
        if character in "<!":
            return [self._token()]
        if character == "(":
            return [self._group(name)]
        if character == ".":
            self._at += 1
            return [Chars((), negated=True)]
        match = _NAME.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return [Ref(self._number(match[0]))]

    def _literal(self) -> list[Element]:
        self._at += 1
        characters: list[Element] = []
        while self._peek() != '"':
            code = self._character()
            characters.append(Chars(((code, code),)))
        self._at += 1
        return characters

    def _class(self) -> Element:
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            low = high = self._character()
            if self._peek() == "-" and self._peek(2) != "-]":
                self._at += 1
                high = self._character()
            if high < low:
                raise self._fail("this range of characters ends before it begins")
            ranges.append((low, high))
        if not ranges:
            raise self._fail("this set of characters is empty")
        self._at += 1
        return Chars(tuple(ranges), negated)

    def _character(self) -> int:
        character = self._peek()
        if not character:
            raise self._fail("the text ends within quotes or brackets")
        if character != "\\":
            self._at += 1
            return ord(character)
        match = self._take(_ESCAPE, 'an escape of \\x00 \\u0000 \\U00000000 \\t \\r \\n \\\\ \\" \\[ \\] \\-')
        code = match[1] or match[2] or match[3]
        return int(code, 16) if code else ord(_PLAIN.get(match[4], match[4]))

    def _token(self) -> Element:
        negated = self._peek() == "!"
        self._at += negated
        match = self._take(_TOKEN, "a token, <text> or <[id]>,")
        self.tokens.append(int(match[1]) if match[1] else match[0])
        return TokenItem(negated)

    def _group(self, name: str) -> Element:
        self._at += 1
        self._skip(_LINES)
        if self._depth == MAX_DEPTH:
            raise self._fail(f"groups are nested more than {MAX_DEPTH} deep")
        self._depth += 1
        number = self._new_number(name)
        self._rules[number] = self._alternatives(name, _LINES)
        self._depth -= 1
        self._expect(")")
        return Ref(number)

    def _repetition(self, blanks: re.Pattern[str]) -> tuple[int, int | None]:
        """Read ``*``, ``+``, ``?`` or ``{m,n}``: the fewest and the most repetitions, None for any number."""
        sign = self._peek()
        self._at += 1
        self._skip(blanks)
        if sign != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        low = int(self._take(_NUMBER, "a number of repetitions")[0])
        high: int | None = low
        self._skip(blanks)
        if self._peek() == ",":
            self._at += 1
            self._skip(blanks)
            digits = _NUMBER.match(self._text, self._at)
            high = int(digits[0]) if digits else None
            self._at = digits.end() if digits else self._at
            self._skip(blanks)
        if max(low, high or 0) > MAX_REPETITIONS:
            raise self._fail(f"more than {MAX_REPETITIONS} repetitions")
        if high is not None and high < low:
            raise self._fail(f"{{{low},{high}}} asks for fewer repetitions at most than at least")
        self._expect("}")
        self._skip(blanks)
        return low, high

    def _repeat(self, elements: list[Element], start: int, low: int, high: int | None, weight: int, name: str) -> int:
        """Write a repetition out in place, as rules for the optional part; return the rules it stands for."""
        item = elements[start:]
        weight *= max(1, low if high is None else high)
        if weight > MAX_REPETITIONS:
            raise self._fail(f"repetitions within repetitions make more than {MAX_REPETITIONS}")
        optional = 1 if high is None else high - low
        self._count(len(item) * (low + optional))
        elements[start:] = item * low
        last: Ref | None = None
        for _ in range(optional):
            rule = Ref(self._new_number(name))
            after: list[Element] = [rule] if high is None else [last] if last is not None else []
            self._rules[rule.number] = [item + after, []]
            last = rule
        if last is not None:
            elements.append(last)
        return weight

    def _count(self, added: int) -> None:
        self._n_elements += added
        if self._n_elements > MAX_ELEMENTS:
            raise self._fail(f"with its repetitions the grammar has more than {MAX_ELEMENTS} elements")
