"""Objects, arrays, strings and numbers of a JSON schema that are bounded by keywords, as rules of a grammar."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from typing import Any, Protocol

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.json_pattern import pattern_rule
from ziggurat.runtime.json_rules import FORMATS, integer_rule, literal, repeated

_MAX_PROPERTIES = 500
_MAX_LENGTH = 2000  # of strings and arrays; what the library can count to
_MAX_BOUND = 10**15

Schema = dict[str, Any]


class Writer(Protocol):
    """What collects the rules of a grammar."""

    def add(self, body: str) -> str:
        """Return the name of a rule with this body."""
        ...

    def primitive(self, name: str) -> str:
        """Return the name of one of ``json_rules.PRIMITIVES``, which is then among the rules."""
        ...

    def value(self, schema: Any, where: str) -> str:
        """Return the name of a rule for the values of a schema."""
        ...

    def only(self, schema: Schema, allowed: Collection[str], where: str) -> None:
        """Raise InvalidRequestError when the schema has other keywords."""
        ...


def refuse(where: str, problem: str) -> InvalidRequestError:
    """Return the error for a schema that cannot be kept to."""
    return InvalidRequestError(f"the JSON schema at {where}: {problem}")


def _object(writer: Writer, schema: Schema, where: str) -> str:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    others = schema.get("additionalProperties", True)
    if not isinstance(properties, dict):
        raise refuse(where, "properties is an object")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise refuse(where, "required is a list of names")
    if not isinstance(others, (bool, dict)):
        raise refuse(where, "additionalProperties is true, false or a schema")
    missing = [name for name in dict.fromkeys(required) if name not in properties]
    if missing and others is False:
        raise refuse(where, f"the property {missing[0]} is required and not allowed")
    members = {**properties, **dict.fromkeys(missing, others)}
    if len(members) > _MAX_PROPERTIES:
        raise refuse(where, f"an object has more than {_MAX_PROPERTIES} properties")
    if members:
        return _members(writer, members, set(required), where)
    if isinstance(others, bool):
        return writer.primitive("object") if others else writer.add('"{" ws "}"')
    value = writer.value(others, f"{where}/additionalProperties")
    member = writer.add(f'{writer.primitive("string")} ws ":" ws {value} ws')
    return writer.add(f'"{{" ws ({member} ("," ws {member})*)? "}}"')


def _members(writer: Writer, members: Schema, required: set[str], where: str) -> str:
    """Write an object's properties in order: of those from the i-th on, one that is next, and what may follow it."""
    pairs = []
    for name, schema in members.items():
        value = writer.value(schema, f"{where}/properties/{name}")
        key = literal(json.dumps(name, ensure_ascii=False))
        pairs.append((writer.add(f'{key} ws ":" ws {value} ws'), name in required))
    one = following = ""
    all_optional = True
    for member, needed in reversed(pairs):
        written = f"{member} {following}".rstrip()
        one = writer.add(f"{written} | {one}" if one and not needed else written)
        all_optional = all_optional and not needed
        following = writer.add(f'"," ws {one} | ""' if all_optional else f'"," ws {one}')
    return writer.add(f'"{{" ws ({one} | "") "}}"' if all_optional else f'"{{" ws {one} "}}"')


def _array(writer: Writer, schema: Schema, where: str) -> str:
    low, high = _lengths(schema, "minItems", "maxItems", where)
    items, prefix = schema.get("items", True), schema.get("prefixItems", [])
    if not isinstance(prefix, list) or isinstance(items, list):
        raise refuse(where, "prefixItems is a list of schemas, and items one schema")
    if items is False:
        high = len(prefix) if high is None else min(high, len(prefix))
        if high < low:
            raise refuse(where, f"an array of {low} items is impossible when there can be {high}")
    prefix = prefix[:high]
    names = [writer.value(part, f"{where}/prefixItems/{index}") for index, part in enumerate(prefix)]
    rest = ""  # what may follow after these
    if items is not False and (high is None or high > len(names)):
        item = writer.value(items, f"{where}/items")
        names = names or [item]
        following = writer.add(f'"," ws {item} ws')
        rest = repeated(following, max(0, low - len(names)), None if high is None else high - len(names))
    for index in reversed(range(len(names))):
        body = f"{names[index]} ws {rest}".rstrip()
        body = f'"," ws {body}' if index else body
        rest = writer.add(body if index < low else f'{body} | ""')
    return writer.add(f'"[" ws {rest} "]"')


def _string(writer: Writer, schema: Schema, where: str) -> str:
    for key, known in (("pattern", _pattern), ("format", _format)):
        if key in schema:
            writer.only(schema, (key,), where)
            return writer.add(f'"\\"" {known(schema[key], where)} "\\""')
    low, high = _lengths(schema, "minLength", "maxLength", where)
    return writer.add(f'"\\"" {repeated(writer.primitive("char"), low, high)} "\\""')


def _pattern(pattern: Any, where: str) -> str:
    if not isinstance(pattern, str):
        raise refuse(where, "pattern is a string")
    try:
        return pattern_rule(pattern)
    except ValueError as error:
        raise refuse(where, f"the pattern {pattern!r:.100} is not supported: {error}") from None


def _format(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in FORMATS:
        raise refuse(where, f"the format {name!r} is not supported; these are: {', '.join(FORMATS)}")
    return FORMATS[name]


def _lengths(schema: Schema, least: str, most: str, where: str) -> tuple[int, int | None]:
    low, high = _length(schema.get(least, 0), least, where), None
    if most in schema:
        high = _length(schema[most], most, where)
        if high < low:
            raise refuse(where, f"{least} is {low} and {most} {high}")
    return low, high


def _length(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value != int(value):
        raise refuse(where, f"{key} is a whole number, not {value!r:.40}")
    if value > _MAX_LENGTH:
        raise refuse(where, f"{key} is {value}, and a grammar counts to {_MAX_LENGTH}")
    return int(value)


def _integer(writer: Writer, schema: Schema, where: str) -> str:
    bounds = {key: _bound(schema[key], key, where) for key in schema}
    lows = [math.ceil(bounds["minimum"])] if "minimum" in bounds else []
    lows += [math.floor(bounds["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in bounds else []
    highs = [math.floor(bounds["maximum"])] if "maximum" in bounds else []
    highs += [math.ceil(bounds["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in bounds else []
    low, high = max(lows, default=None), min(highs, default=None)
    if low is not None and high is not None and high < low:
        raise refuse(where, f"there is no integer from {low} to {high}")
    return writer.add(integer_rule(low, high))


def _number(writer: Writer, schema: Schema, where: str) -> str:
    if list(schema) != ["minimum"] or _bound(schema["minimum"], "minimum", where) != 0:
        raise refuse(where, "of numbers that may be no integers only a minimum of 0 is supported")
    return writer.primitive("positive")


def _bound(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) >= _MAX_BOUND:
        raise refuse(where, f"{key} is a number of at most 15 digits, not {value!r:.40}")
    return value


#: Which keywords bound the values of a type, and what makes the rule.
KEYWORDS: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
}
BOUNDED: dict[str, Callable[[Writer, Schema, str], str]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": _integer,
    "number": _number,
}
