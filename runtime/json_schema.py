"""Turns a JSON schema into a grammar whose every text is valid by it.

A strict subset of JSON Schema 2020-12: what cannot be kept to is refused by name, never ignored. Supported are

- ``type`` (one or several), ``enum``, ``const``, ``anyOf``; ``oneOf`` where no value can fit two of its schemas (other
  types, or objects that differ in a required constant); ``allOf`` of one schema; ``$ref`` within the document, also
  recursive ones; ``true`` and ``{}``
- objects: ``properties``, ``required``, ``additionalProperties``
- arrays: ``items``, ``prefixItems``, ``minItems``, ``maxItems``
- strings: ``minLength``, ``maxLength``, ``pattern`` (see ``json_pattern.py``), ``format`` (date, time, date-time, uuid,
  ipv4)
- ``minimum``, ``maximum`` and their exclusive forms for integers; for other numbers only a minimum of 0

Not every valid text can be made: properties come in the order of the schema, an object with ``properties`` gets no
others, whitespace and the length of numbers are bounded. Annotations (``title``, ``default``, …) mean nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from typing import Any

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.grammar import read_grammar
from ziggurat.runtime.json_rules import PRIMITIVES, SPACE, alternatives, one_of
from ziggurat.runtime.json_values import BOUNDED, KEYWORDS, refuse

_MAX_BYTES = 256 * 1024
_MAX_RULES = 20_000
_MAX_DEPTH = 100

_ANNOTATIONS = frozenset(
    "$schema $id $anchor $comment $defs definitions title description default examples deprecated readOnly writeOnly"
    " discriminator example".split()
)
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")


@functools.lru_cache(maxsize=32)
def schema_grammar(text: str) -> str:
    """Return the grammar (GBNF) of a JSON schema. Raises InvalidRequestError naming what is wrong or unsupported."""
    grammar = schema_rules(text)
    try:
        read_grammar(grammar)
    except InvalidRequestError as error:  # endless, or too large or ambiguous
        raise InvalidRequestError(f"the JSON schema makes no usable grammar: {error}") from None
    return grammar


@functools.lru_cache(maxsize=256)
def schema_rules(text: str) -> str:
    """Return the same to be part of a larger grammar, which is then to be read as a whole: that takes far longer."""
    schema = _parse(text)
    try:
        return _Writer(schema).grammar()
    except RecursionError:
        raise InvalidRequestError("the JSON schema makes no usable grammar: it is too complex") from None


def _parse(text: str) -> Any:
    def reject(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    if len(text) > _MAX_BYTES:
        raise InvalidRequestError(f"the JSON schema has {len(text)} characters; at most {_MAX_BYTES} are read")
    try:
        text.encode("utf-8")
        schema = json.loads(text, parse_constant=reject)
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # broken JSON, too deep, 1e999, a lone surrogate
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequestError(f"the JSON schema cannot be read: {reason}") from None
    return schema


class _Writer:
    """Collects rules. Each method takes a schema and where it stands, and returns the name of the rule for it."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._rules: dict[str, str] = {"ws": SPACE}
        self._by_body: dict[str, str] = {}
        self._refs: dict[str, str] = {}
        self._depth = 0

    def grammar(self) -> str:
        self._rules["root"] = self.value(self._root, "#")
        return "\n".join(f"{name} ::= {body}" for name, body in self._rules.items()) + "\n"

    def add(self, body: str) -> str:
        """Return the name of a rule with this body, a new one if there is none yet."""
        known = self._by_body.get(body)
        if known is None:
            known = self._by_body[body] = f"r{len(self._rules)}"
            self._define(known, body)
        return known

    def _define(self, name: str, body: str) -> None:
        if len(self._rules) == _MAX_RULES:
            raise InvalidRequestError(f"the JSON schema makes more than {_MAX_RULES} rules; simplify it")
        self._rules[name] = body

    def primitive(self, name: str) -> str:
        if name not in self._rules:
            body, needs = PRIMITIVES[name]
            self._define(name, body)
            for other in needs:
                self.primitive(other)
        return name

    def value(self, schema: Any, where: str) -> str:
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            problem = "false allows nothing" if schema is False else "a schema is an object, true or false"
            raise refuse(where, problem)
        if self._depth == _MAX_DEPTH:
            raise refuse(where, f"schemas are nested more than {_MAX_DEPTH} deep")
        self._depth += 1
        asserted = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        for key, rule in (
            ("$ref", self._ref),
            ("const", self._const),
            ("enum", self._enum),
            ("anyOf", self._any_of),
            ("oneOf", self._one_of),
            ("allOf", self._all_of),
        ):
            if key in asserted:
                name = rule(asserted, where)
                break
        else:
            name = self._typed(asserted, where)
        self._depth -= 1
        return name

    def only(self, schema: dict[str, Any], allowed: Collection[str], where: str) -> None:
        for key in schema:
            if key not in allowed:
                others = [other for other in schema if other in allowed]
                beside = f" beside {others[0]}" if others else ""
                raise refuse(where, f"the keyword {key} is not supported{beside}")

    def _ref(self, schema: dict[str, Any], where: str) -> str:
        self.only(schema, ("$ref",), where)
        ref = schema["$ref"]
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise refuse(where, f"$ref {ref!r} leads out of the document, and nothing is ever fetched")
        if ref not in self._refs:
            name = self._refs[ref] = f"ref{len(self._refs)}"  # before what it stands for, which may refer to it
            self._define(name, "")
            self._rules[name] = self.value(self._find(ref, where), ref)
        return self._refs[ref]

    def _find(self, ref: str, where: str) -> Any:
        found = self._root
        for part in ref.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isascii() and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise refuse(where, f"$ref {ref} leads to nothing")
        return found

    def _const(self, schema: dict[str, Any], where: str) -> str:
        return self._constants(schema, "const", [schema["const"]], where)

    def _enum(self, schema: dict[str, Any], where: str) -> str:
        values = schema["enum"]
        if not isinstance(values, list):
            raise refuse(where, "enum is a list of values")
        return self._constants(schema, "enum", values, where)

    def _constants(self, schema: dict[str, Any], key: str, values: list[Any], where: str) -> str:
        self.only(schema, (key, "type"), where)
        types = self._types(schema, where)
        fitting = [value for value in values if any(_is_of(value, kind) for kind in types)]
        if not fitting:
            raise refuse(where, f"no value of {key} is of the type")
        texts = dict.fromkeys(json.dumps(value, ensure_ascii=False) for value in fitting)
        return self.add(one_of(list(texts), self.add))

    def _any_of(self, schema: dict[str, Any], where: str, key: str = "anyOf") -> str:
        self.only(schema, (key,), where)
        parts = schema[key]
        if not isinstance(parts, list) or not parts:
            raise refuse(where, f"{key} is a list of schemas")
        names = [self.value(part, f"{where}/{key}/{index}") for index, part in enumerate(parts)]
        return self.add(alternatives(list(dict.fromkeys(names))))

    def _one_of(self, schema: dict[str, Any], where: str) -> str:
        parts = schema["oneOf"]
        if isinstance(parts, list):
            marks = [self._marks(part, where) for part in parts]
            for index, mark in enumerate(marks):
                if any(not _differ(mark, other) for other in marks[:index]):
                    raise refuse(where, "a value may fit two schemas of oneOf; use anyOf, or a constant to tell them")
        return self._any_of(schema, where, "oneOf")

    def _marks(self, schema: Any, where: str) -> tuple[set[str], dict[str, set[str]]]:
        """Return the types of a schema, and the constants that its required properties may have."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                break
            schema = self._find(schema["$ref"], where)
        if not isinstance(schema, dict):
            return set(_TYPES), {}
        constants = {}
        properties = schema.get("properties")
        required = schema.get("required")
        for name, value in properties.items() if isinstance(properties, dict) else ():
            if isinstance(value, dict) and isinstance(required, list) and name in required:
                values = value.get("enum") if "enum" in value else [value["const"]] if "const" in value else None
                if isinstance(values, list):
                    constants[name] = {json.dumps(constant, sort_keys=True) for constant in values}
        values = schema.get("enum") if "enum" in schema else [schema["const"]] if "const" in schema else None
        if isinstance(values, list) and "type" not in schema:
            return {kind for kind in _TYPES for value in values if _is_of(value, kind)}, constants
        return set(self._types(schema, where)) if "type" in schema else set(_TYPES), constants

    def _all_of(self, schema: dict[str, Any], where: str) -> str:
        self.only(schema, ("allOf",), where)
        parts = schema["allOf"]
        if not isinstance(parts, list) or len(parts) != 1:
            raise refuse(where, "allOf is supported with one schema only")
        return self.value(parts[0], f"{where}/allOf/0")

    def _types(self, schema: dict[str, Any], where: str) -> list[str]:
        given = schema.get("type", list(_TYPES))
        types = given if isinstance(given, list) else [given]
        unknown = [kind for kind in types if kind not in _TYPES]
        if unknown or not types:
            raise refuse(where, f"type is one or more of {', '.join(_TYPES)}, not {given!r}")
        return types

    def _typed(self, schema: dict[str, Any], where: str) -> str:
        keywords = set(schema) - {"type"}
        types = self._types(schema, where)
        if "type" not in schema:
            if not keywords:
                return self.primitive("value")
            # a keyword bounds values of its type only; the type itself is what was meant
            types = [kind for kind in ("object", "array", "string") if keywords & KEYWORDS[kind]]
            if len(types) != 1:
                raise refuse(where, f"the keyword {min(keywords)} is not supported without a type")
        known = set().union(*(KEYWORDS.get(kind, set()) for kind in types))
        self.only(schema, known | {"type"}, where)
        names = []
        for kind in dict.fromkeys(types):
            if kind == "integer" and "number" in types:
                continue
            own = {key: schema[key] for key in schema if key in KEYWORDS.get(kind, set())}
            names.append(BOUNDED[kind](self, own, where) if own else self.primitive(kind))
        return names[0] if len(names) == 1 else self.add(alternatives(names))


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    kinds = {int: ("integer", "number"), str: ("string",), list: ("array",), dict: ("object",)}
    return kind in kinds[type(value)]


def _differ(one: tuple[set[str], dict[str, set[str]]], other: tuple[set[str], dict[str, set[str]]]) -> bool:
    types = one[0] & other[0]
    if {"integer", "number"} & one[0] and {"integer", "number"} & other[0]:
        types |= {"number"}
    if not types:
        return True
    return types == {"object"} and any(not one[1][name] & other[1][name] for name in one[1].keys() & other[1].keys())
