"""The pieces of grammar (GBNF) that JSON is made of."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence

#: Between tokens: nothing, a space, or a new line with an indentation; bounded, so that a model cannot stay in it.
SPACE = '(" " | "\\n" [ \\t]{0,20})?'

# Digits are bounded so that a number is neither endless nor infinite; \\u spells no surrogates, of which half a pair
# would be no text.
_HEX = "[0-9a-fA-F]"
_INTEGER = '("0" | [1-9] [0-9]{0,15})'
_FRACTION = '("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?'
_CHAR = (
    f'[^"\\\\\\x00-\\x1F\\x7F] | "\\\\" (["\\\\/bfnrt] | "u" ([0-9a-cA-CefEF] {_HEX}{{3}} | [dD] [0-7] {_HEX}{{2}}))'
)
#: Bodies of the rules that every grammar may need, by name, and the rules that each of them needs.
PRIMITIVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "value": (
        "object | array | string | number | boolean | null",
        ("object", "array", "string", "number", "boolean", "null"),
    ),
    "object": ('"{" ws (member ("," ws member)*)? "}"', ("member",)),
    "member": ('string ws ":" ws value ws', ("string", "value")),
    "array": ('"[" ws (value ws ("," ws value ws)*)? "]"', ("value",)),
    "string": ('"\\"" char* "\\""', ("char",)),
    "char": (_CHAR, ()),
    "integer": (f'"-"? {_INTEGER}', ()),
    "number": (f'"-"? {_INTEGER} {_FRACTION}', ()),
    "positive": (f"{_INTEGER} {_FRACTION}", ()),
    "boolean": ('"true" | "false"', ()),
    "null": ('"null"', ()),
}

# every month has 28 days: the 29th to 31st are left to those that have them
_DATE = (
    '[0-9]{4} "-" (("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
    ' | ("0" [13-9] | "1" [0-2]) "-" ("29" | "30") | ("0" [13578] | "1" [02]) "-31")'
)
_ZONE = '("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
_TIME = f'([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{{1,9}})? {_ZONE}'
_BYTE = '("25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9]? [0-9])'
#: What is between the quotes of a string with a format (RFC 3339, RFC 4122, RFC 2673).
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": f'{_HEX}{{8}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{12}}',
    "ipv4": f'{_BYTE} "." {_BYTE} "." {_BYTE} "." {_BYTE}',
}
_MAX_DIGITS = 16


def literal(text: str) -> str:
    """Return a text as it is written in a grammar."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\x00"}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'


def alternatives(rules: Sequence[str]) -> str:
    """Return an expression for one of these."""
    return rules[0] if len(rules) == 1 else " | ".join(rules)


def one_of(texts: Sequence[str], add: Callable[[str], str]) -> str:
    """Return an expression for one of these different texts; ``add`` makes a rule of an expression and names it.

    What they begin with alike is written once: the library follows every alternative that is still possible.
    """
    if len(texts) == 1:
        return literal(texts[0])
    start = os.path.commonprefix(list(texts))
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[len(start) : len(start) + 1], []).append(text[len(start) :])
    rest = alternatives([one_of(group, add) for group in groups.values()])
    return f"{literal(start)} {add(rest)}" if start else rest


def repeated(item: str, low: int, high: int | None) -> str:
    """Return an expression for an item (a rule, not a sequence) ``low`` to ``high`` times, None: without limit."""
    if high == 0:
        return ""
    if (low, high) == (1, 1):
        return item
    if high is None:
        return {0: f"{item}*", 1: f"{item}+"}.get(low, f"{item}{{{low},}}")
    return f"{item}{{{low}}}" if low == high else f"{item}{{{low},{high}}}"


def integer_rule(low: int | None, high: int | None) -> str:
    """Return an expression for the integers of a range, both ends included, None: as many digits as there may be."""
    found = []
    if low is None or low < 0:
        nearest = 1 if high is None else max(1, -high)
        if low is None or nearest <= -low:
            found.append(f'"-" ({alternatives(_naturals(nearest, None if low is None else -low))})')
    if high is None or high >= 0:
        found += _naturals(max(0, low or 0), high)
    return alternatives(found)


def _naturals(low: int, high: int | None) -> list[str]:
    """Return expressions for the numbers of a range, one for each number of digits at least."""
    found = []
    for length in range(len(str(low)), (len(str(high)) if high is not None else len(str(low))) + 1):
        smallest = max(low, 10 ** (length - 1) if length > 1 else 0)
        largest = 10**length - 1 if high is None else min(high, 10**length - 1)
        found += _of_length(str(smallest), str(largest))
    if high is None and len(str(low)) < _MAX_DIGITS:
        found.append(f"[1-9] [0-9]{{{len(str(low))},{_MAX_DIGITS - 1}}}")
    return found


def _of_length(low: str, high: str) -> list[str]:
    """Return expressions for the digits from ``low`` to ``high``, which are equally many."""
    if low == high:
        return [f'"{low}"']
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    if not rest:
        return [f"[{first}-{last}]"]
    if first == last:
        return [f'"{first}" ({alternatives(_of_length(low[1:], high[1:]))})']
    found = []
    if set(low[1:]) != {"0"}:
        found.append(f'"{first}" ({alternatives(_of_length(low[1:], "9" * rest))})')
        first += 1
    after = []
    if set(high[1:]) != {"9"}:
        after.append(f'"{last}" ({alternatives(_of_length("0" * rest, high[1:]))})')
        last -= 1
    if first <= last:
        found.append(f"[{first}-{last}] [0-9]{{{rest}}}")
    return found + after
