from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.grammars import accepts, random_text
from ziggurat.runtime.bindings import Model
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.grammar import read_grammar
from ziggurat.runtime.json_schema import schema_grammar
from ziggurat.runtime.server.tools.definitions import Function
from ziggurat.runtime.server.tools.forced import MAX_CALLS, calls_grammar
from ziggurat.runtime.server.tools.forms import GENERIC, HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, Form
from ziggurat.runtime.server.tools.parser import ToolCallParser

FORMS = (HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, GENERIC)
WEATHER = Function(
    "weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
    },
)
LINKED = Function(
    "linked",
    parameters={
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
        "type": "object",
        "properties": {"list": {"$ref": "#/$defs/node"}},
        "required": ["list"],
    },
)
NOTHING = Function("nothing")


def letters(_text: str) -> int | None:
    return None


def grammar(form: Form, *functions: Function, parallel: bool = True, **more: Any) -> str:
    return calls_grammar(form, functions, parallel=parallel, token_of=letters, **more)


ONE = {
    HERMES: '<tool_call>\n{"name": "weather", "arguments": {"city": "Ur"}}\n</tool_call>',
    LLAMA: '{"name": "weather", "parameters": {"city": "Ur"}}',
    MISTRAL: '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Ur"}}]',
    MISTRAL_NAMED: '[TOOL_CALLS]weather[ARGS]{"city": "Ur"}',
    GENERIC: '{"tool_calls":[{"name": "weather", "arguments": {"city": "Ur"}}]}',
}
TWO = {
    HERMES: ONE[HERMES] + "\n" + ONE[HERMES],
    LLAMA: ONE[LLAMA] + "; " + ONE[LLAMA],
    MISTRAL: ONE[MISTRAL][:-1] + ", " + ONE[MISTRAL][13:],
    MISTRAL_NAMED: ONE[MISTRAL_NAMED] * 2,
    GENERIC: ONE[GENERIC][:-2] + ", " + ONE[GENERIC][15:],
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_calls_and_nothing_else(bpe_model: Model, form: Form) -> None:
    vocab, several, one = bpe_model.vocab, grammar(form, WEATHER, NOTHING), grammar(form, WEATHER, parallel=False)
    assert accepts(vocab, several, ONE[form]) and accepts(vocab, one, ONE[form])
    assert accepts(vocab, several, TWO[form]) != form.one_call and not accepts(vocab, one, TWO[form])
    assert accepts(vocab, several, ONE[form].replace("weather", "nothing").replace('"city": "Ur"', ""))
    replaced = [("weather", "other"), ("city", "town"), ('"Ur"', '"Babylon"'), ('"city": "Ur"', "")]
    for wrong in ("Hello", "", ONE[form] + " x", *(ONE[form].replace(*pair) for pair in replaced)):
        assert not accepts(vocab, several, wrong), wrong


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("seed", range(3))
def test_what_a_grammar_makes_is_read_as_calls(bpe_model: Model, form: Form, seed: int) -> None:
    text = random_text(bpe_model.vocab, grammar(form, WEATHER, LINKED, NOTHING), seed)
    assert text is not None
    parser = ToolCallParser(form, ["weather", "linked", "nothing"])
    said = [
        delta
        for delta in (*parser.feed(text), *parser.finish())
        if hasattr(delta, "text") and not hasattr(delta, "index")
    ]
    assert said == [] and 1 <= parser.n_calls <= MAX_CALLS


def test_control_tokens_are_named() -> None:
    text = calls_grammar(MISTRAL_NAMED, [NOTHING], parallel=True, token_of={"[TOOL_CALLS]": 5, "[ARGS]": 7}.get)
    assert read_grammar(text).tokens == (7, 5)
    assert "TOOL_CALLS" not in text


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_or_an_answer_of_a_schema(bpe_model: Model, form: Form) -> None:
    either = grammar(form, WEATHER, otherwise=schema_grammar('{"enum": ["no [a-z] call", 7]}'))
    for text in (ONE[form], '"no [a-z] call"', "7"):
        assert accepts(bpe_model.vocab, either, text)
    assert not accepts(bpe_model.vocab, either, "8")


def test_as_many_functions_as_there_may_be() -> None:
    functions = [Function(f"function_{number}", parameters=WEATHER.parameters) for number in range(128)]
    for form in FORMS:
        read_grammar(grammar(form, *functions))


def test_a_schema_without_grammar_is_refused_with_its_function() -> None:
    function = Function("odd", parameters={"type": "object", "properties": {"x": {"not": {}}}})
    with pytest.raises(InvalidRequestError, match="the parameters of odd: the JSON schema at #/properties/x: .*not"):
        grammar(HERMES, function)
    with pytest.raises(InvalidRequestError, match="the parameters of odd"):
        Function("odd", parameters=json.loads(json.dumps(function.parameters)), strict=True)
