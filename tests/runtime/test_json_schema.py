from __future__ import annotations

import json
import re
from typing import Any

import pytest

from helpers.grammars import accepts, random_text
from ziggurat.runtime.bindings import Model
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.json_rules import integer_rule
from ziggurat.runtime.json_schema import schema_grammar

LINKED = {
    "$defs": {
        "node": {
            "type": "object",
            "title": "Node",
            "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
        }
    },
    "$ref": "#/$defs/node",
}
TAGGED = {
    "oneOf": [
        {"type": "object", "properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind"]},
        {"type": "object", "properties": {"kind": {"enum": ["b", "c"]}}, "required": ["kind"]},
    ]
}


def of(*properties: str, required: tuple[str, ...] = (), **keywords: Any) -> dict[str, Any]:
    members = {name: {"type": "integer"} for name in properties}
    return {"type": "object", "properties": members, "required": list(required), **keywords}


ACCEPTED: list[tuple[Any, list[str], list[str]]] = [
    (True, ["1", '"a"', '{"a": [1, {"b": null}]}', "[ ]", "-1.5e-3", "true"],
     ["", "01", "nul", '{"a"}', "[1,]", "NaN"]),
    ({"type": "string"}, ['""', r'"\"\\\/\b\u00e9\uD7FF"', '"é日"'], ['"\n"', r'"\x"', r'"\ud800"', '"a']),
    ({"type": "boolean"}, ["true", "false"], ["null", " true"]),
    ({"type": ["integer", "null"]}, ["0", "-12", "null"], ["1.5", "-", '"a"']),
    ({"type": "number", "minimum": 0}, ["0", "1.5"], ["-1"]),
    ({"enum": ["red", "rose", 'a"b', "é", 1, None, {"x": [1]}]},
     ['"rose"', r'"a\"b"', "null", '{"x": [1]}'], ['"r"', "2"]),
    ({"enum": ["a", 1], "type": "string"}, ['"a"'], ["1"]),
    ({"const": "a\nb\u007f"}, ['"a\\nb\u007f"'], ['"a"']),
    (of("a", "b", "c", required=("b",)), ['{"b":1}', '{"a": 1, "b": 2}', '{"b":1,"c":2}', '{"a":1,"b":2,"c":3}'],
     ["{}", '{"a":1}', '{"b":1,"a":2}', '{"b":1,}', '{"b":1 "c":2}', '{,"b":1}', '{"b":1,"d":2}']),
    (of("a", "b"), ["{}", '{"a":1}', '{"b":1}', '{ "a":1,\n  "b": 2}'], ['{"b":1,"a":1}', '{"a":1,}']),
    (of(required=("z",)), ['{"z": "anything"}'], ["{}"]),
    ({"type": "object", "additionalProperties": False}, ["{}", "{ }"], ['{"a":1}']),
    ({"type": "object", "additionalProperties": {"type": "integer"}},
     ["{}", '{"a":1,"b":2}'], ['{"a":"b"}', '{"a":1,}']),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
     ["[1]", "[1, 2,3]"], ["[]", "[1,2,3,4]"]),
    ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False},
     ["[]", "[1]", "[1,null]"],
     ["[null]", "[1,null,1]"]),
    ({"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "minItems": 1,
      "maxItems": 4},
     ["[1]", "[1,2]", "[1,2,3,3]"], ["[]", "[1,3]", "[1,2,3,3,3]"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', r'"\u00e9bc"', '"日本語"'], ['"a"', '"abcd"']),
    ({"type": "string", "format": "date"},
     ['"2024-02-28"', '"2023-12-31"'], ['"2023-02-30"', '"2023-13-01"', '"2023-04-31"']),
    ({"type": "string", "format": "date-time"},
     ['"2024-02-28T23:59:59.5Z"', '"2024-02-28T00:00:00+02:00"'], ['"2024-02-28"']),
    ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123e4567"']),
    ({"type": "string", "format": "ipv4"}, ['"0.10.199.255"'], ['"256.1.1.1"', '"1.1.1"']),
    (LINKED, ['{"v":1,"next":null}', '{"v":1,"next":{"v":2,"next":null}}'], ['{"v":1}']),
    (TAGGED, ['{"kind":"a","n":1}', '{"kind":"c"}'], ['{"kind":"b","n":1}', '{"n":1}']),
    ({"anyOf": [{"type": "integer"}, {"items": {"$ref": "#"}}]}, ["1", "[[1],[]]"], ['"a"']),
    ({"allOf": [{"$ref": "#/definitions/a~1b"}], "definitions": {"a/b": {"type": "null"}}}, ["null"], ["1"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "yes", "no"), ACCEPTED)
def test_texts_of_a_schema(bpe_model: Model, schema: Any, yes: list[str], no: list[str]) -> None:
    grammar = schema_grammar(json.dumps(schema))
    vocab = bpe_model.vocab
    assert [text for text in yes if not accepts(vocab, grammar, text)] == []
    assert [text for text in no if accepts(vocab, grammar, text)] == []
    for seed in range(3):
        text = random_text(vocab, grammar, seed)
        if text is not None:
            json.loads(text)


@pytest.mark.parametrize(
    ("pattern", "texts", "others"),
    [
        ("^[a-c]{2}(-\\d+)?$", ["ab", "ca-12"], ["a", "ab-", "abd"]),
        ("a|b+?c", ["a", "bbc"], ["b", "ac"]),
        ('^["\\\\\\n]x$', ['"x', "\\x", "\nx"], ["x"]),
        ("[^\\s\"]\\W.", ["a b", "é-\\"], [" -a", '"-a', "aaa", "a-\n"]),
        ("(?:x{2,3}|\\.){2}", ["xxxxx", ".xx", ".."], ["x", ".", "xxxxxxx"]),
        ("[\\w.-]+@\\x41\\u00e9", ["a.b-c@Aé"], ["@Aé"]),
        ("", [""], ["a"]),
    ],
)  # fmt: skip
def test_texts_of_a_pattern(bpe_model: Model, pattern: str, texts: list[str], others: list[str]) -> None:
    grammar = schema_grammar(json.dumps({"type": "string", "pattern": pattern}))
    for text in texts:
        assert accepts(bpe_model.vocab, grammar, json.dumps(text, ensure_ascii=False)), text
    for text in others:
        assert not accepts(bpe_model.vocab, grammar, json.dumps(text, ensure_ascii=False)), text
    for seed in range(3):
        found = random_text(bpe_model.vocab, grammar, seed)
        assert found is None or re.search(pattern, json.loads(found), re.ASCII)  # as in JavaScript


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 9),
        (3, 27),
        (-15, 120),
        (7, None),
        (10, None),
        (None, 5),
        (None, -12),
        (-3, None),
        (99, 101),
        (1, 1),
        (None, 0),
    ],
)
def test_integers_of_a_range(bpe_model: Model, low: int | None, high: int | None) -> None:
    grammar = "root ::= " + integer_rule(low, high)
    for value in [*range(-20, 131), 999, 1000, -999]:
        inside = (low is None or low <= value) and (high is None or value <= high)
        assert accepts(bpe_model.vocab, grammar, str(value)) is inside, value
    assert not any(accepts(bpe_model.vocab, grammar, text) for text in ("-0", "00", "01", "", "-"))


REFUSED: list[tuple[Any, str]] = [
    (False, "allows nothing"),
    ([1], "an object, true or false"),
    ({"type": "text"}, "type is one or more of"),
    ({"type": []}, "type is one or more of"),
    ({"not": {}}, "keyword not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported beside type"),
    ({"type": "integer", "multipleOf": 2}, "multipleOf"),
    ({"type": "object", "patternProperties": {}}, "patternProperties"),
    ({"type": "integer", "minLength": 2}, "minLength"),
    ({"minimum": 3}, "without a type"),
    ({"$ref": "https://example.org/schema.json"}, "nothing is ever fetched"),
    ({"$ref": "other.json#/a"}, "nothing is ever fetched"),
    ({"$ref": "#/nowhere"}, "leads to nothing"),
    ({"$ref": "#", "minLength": 1}, "minLength is not supported beside"),
    ({"$ref": "#"}, "never ends"),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "begin with itself"),
    ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "never ends"),
    ({"anyOf": []}, "list of schemas"),
    ({"allOf": [{}, {}]}, "one schema only"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "may fit two"),
    ({"oneOf": [{"const": 1}, {"const": 1}]}, "may fit two"),
    ({"enum": []}, "no value of enum"),
    ({"enum": [1], "type": "string"}, "no value of enum"),
    ({"properties": {"a": 1}}, "at #/properties/a"),
    ({"properties": {}, "required": ["a"], "additionalProperties": False}, "required and not allowed"),
    ({"type": "string", "minLength": 5, "maxLength": 4}, "minLength is 5"),
    ({"type": "string", "maxLength": 1e9}, "counts to 2000"),
    ({"type": "string", "maxLength": -1}, "whole number"),
    ({"type": "array", "items": [{}]}, "items one schema"),
    ({"type": "array", "items": False, "minItems": 1}, "impossible"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "no integer"),
    ({"type": "integer", "minimum": 1e30}, "15 digits"),
    ({"type": "number", "maximum": 2}, "minimum of 0"),
    ({"type": "string", "format": "email"}, "these are: date"),
    ({"type": "string", "format": "date", "maxLength": 4}, "maxLength is not supported beside format"),
    ({"type": "string", "pattern": "(?=a)"}, "looking around"),
    ({"type": "string", "pattern": "(a)\\1"}, r"\\1 is not supported"),
    ({"type": "string", "pattern": "\\bword"}, "not supported"),
    ({"type": "string", "pattern": "a^b"}, "at the ends only"),
    ({"type": "string", "pattern": "a**"}, "repetition of a repetition"),
    ({"type": "string", "pattern": "(a"}, "a group"),
    ({"type": "string", "pattern": "a)"}, "closed that was not opened"),
    ({"type": "string", "pattern": "[a"}, "within a set"),
    ({"type": "string", "pattern": "(a|a)*"}, "too ambiguous"),
    ({"type": "string", "pattern": "(a*)*"}, "begin with itself"),
    ({"type": "string", "pattern": "a{3000}"}, "more than 2000"),
    ({"type": "string", "pattern": "(" * 200 + ")" * 200}, "nested"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_what_cannot_be_kept_to_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        schema_grammar(json.dumps(schema))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"const": NaN}',
        '{"const": 1e999}',
        '{"const": "\\ud800"}',
        "\ud800",
        "{}" + " " * 300_000,
    ],
)
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="the JSON schema"):
        schema_grammar(text)


def test_large_schemas_are_bounded(bpe_model: Model) -> None:
    names = [f"name{index}" for index in range(100)]
    grammar = schema_grammar(json.dumps(of(*names)))
    assert accepts(bpe_model.vocab, grammar, '{"name17": 1, "name99": 2}')
    words = [f"word{index * 7919}" for index in range(300)]
    grammar = schema_grammar(json.dumps({"enum": words}))
    assert accepts(bpe_model.vocab, grammar, json.dumps(words[77]))
    assert not accepts(bpe_model.vocab, grammar, '"word1"')
    with pytest.raises(InvalidRequestError, match="more than 500 properties"):
        schema_grammar(json.dumps(of(*(f"n{index}" for index in range(501)))))
    nested: dict[str, Any] = {}
    for _ in range(150):
        nested = {"items": nested}
    with pytest.raises(InvalidRequestError, match="deep"):
        schema_grammar(json.dumps(nested))
