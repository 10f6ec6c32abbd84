from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from helpers import templates, tool_templates
from helpers.fake_engine import INFO, FakeEngine
from ziggurat.runtime.engine import GenerationRequest
from ziggurat.runtime.server.app import create_app

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ur"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


class Server:
    """A server over an engine that says a text, a few characters at a time."""

    def __init__(self, text: str = CALL, template: str | None = tool_templates.HERMES) -> None:
        pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
        self.engine = FakeEngine(pieces, info=replace(INFO, chat_template=template))
        self.client = TestClient(create_app(self.engine))

    def ask(self, **fields: Any) -> Any:
        fields = {"messages": [{"role": "user", "content": "Rain?"}], "tools": [WEATHER, TIME], **fields}
        return self.client.post("/v1/chat/completions", json={k: v for k, v in fields.items() if v is not None})

    def choice(self, **fields: Any) -> dict[str, Any]:
        answer = self.ask(**fields)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["choices"][0]
        return found

    def deltas(self, **fields: Any) -> tuple[list[dict[str, Any]], str]:
        """Return the deltas of the first choice, and why it ended."""
        lines = self.ask(stream=True, **fields).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == 0]
        return [choice["delta"] for choice in choices], choices[-1]["finish_reason"]

    @property
    def request(self) -> GenerationRequest:
        return self.engine.requests[-1]


def test_a_call_is_no_text() -> None:
    server = Server("Let me see.\n" + CALL)
    choice = server.choice()
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Ur"}'}
    assert [tool["function"]["name"] for tool in server.request.tools] == ["weather", "time"]
    assert server.request.sampling.grammar is None
    assert server.request.shown == ("<tool_call>", "</tool_call>")


def test_answers_without_calls_are_as_ever() -> None:
    choice = Server("It rains.").choice()
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It rains.", "stop")
    assert "tool_calls" not in choice["message"]
    assert Server(CALL).choice()["message"]["content"] is None


def test_calls_are_streamed_as_they_are_written() -> None:
    deltas, reason = Server("So:" + CALL + "\n" + CALL.replace("Ur", "Uruk")).deltas()
    assert reason == "tool_calls"
    assert deltas[0] == {"role": "assistant", "content": None, "refusal": None} and deltas[-1] == {}
    assert "".join(delta.get("content") or "" for delta in deltas) == "So:"
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    begun = [part for part in parts if "id" in part]
    assert [(part["index"], part["type"], part["function"]) for part in begun] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "weather", "arguments": ""}),
    ]
    for index, city in enumerate(("Ur", "Uruk")):
        pieces = [part["function"]["arguments"] for part in parts if part["index"] == index]
        assert json.loads("".join(pieces)) == {"city": city} and len(pieces) > 3


def test_each_choice_has_its_calls() -> None:
    answer = Server().ask(n=2).json()
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]]
    assert len(set(ids)) == 2


def test_a_call_that_was_cut_off_ended_by_length() -> None:
    deltas, reason = Server().deltas(max_tokens=18)
    assert reason == "length" and any("tool_calls" in delta for delta in deltas)
    choice = Server().choice(max_tokens=18)
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("<tool_call>")


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_only_ends_the_answer(stream: bool) -> None:
    ended = []

    def script(request: GenerationRequest) -> Iterator[str]:
        yield from (CALL, "\n")
        ended.append(server.engine._running[request.id].wait(10))
        yield "more"

    server = Server()
    server.engine._script = script
    if stream:
        deltas, reason = server.deltas(parallel_tool_calls=False)
        assert sum("tool_calls" in delta for delta in deltas) >= 1
    else:
        choice = server.choice(parallel_tool_calls=False)
        reason = choice["finish_reason"]
        assert len(choice["message"]["tool_calls"]) == 1
    assert reason == "tool_calls" and ended == [True]


def test_none_calls_nothing() -> None:
    server = Server()
    choice = server.choice(tool_choice="none")
    assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
    assert server.request.tools == () == server.request.shown


@pytest.mark.parametrize(
    ("tool_choice", "names", "several"),
    [
        ("required", {"weather", "time"}, True),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}, False),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME, WEATHER]}},
            {"weather", "time"},
            True,
        ),
    ],
)
def test_forced_calls_have_a_grammar(tool_choice: Any, names: set[str], several: bool) -> None:
    server = Server()
    server.choice(tool_choice=tool_choice)
    grammar = server.request.sampling.grammar
    assert grammar is not None
    assert {name for name in ("weather", "time") if f'\\"{name}\\"' in grammar} == names
    assert ("{0,15}" in grammar.split("answer ::= ")[1]) == several
    assert {tool["function"]["name"] for tool in server.request.tools} == names


def test_required_with_one_call_at_most() -> None:
    server = Server()
    server.choice(tool_choice="required", parallel_tool_calls=False)
    assert "{0,15}" not in (server.request.sampling.grammar or "").split("answer ::= ")[1]


def test_a_format_beside_tools_is_of_answers_without_calls() -> None:
    server = Server('{"n": 1}')
    choice = server.choice(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}})
    assert choice["message"]["content"] == '{"n": 1}'
    grammar = server.request.sampling.grammar or ""
    assert "root ::= answer | otherwise-root" in grammar and '\\"n\\"' in grammar


def test_templates_without_tools() -> None:
    said = '{"tool_calls": [{"name": "weather", "arguments": {"city": "Ur"}}]}'
    server = Server(said, templates.CHATML)
    choice = server.choice()
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert server.request.tools == ()
    assert server.request.messages is not None and "tells the weather" in server.request.messages[0].content


def test_results_go_back_into_the_prompt() -> None:
    server = Server("Dry.")
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ur"}'}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "dry"}]},
    ]
    assert server.choice(messages=messages)["message"]["content"] == "Dry."
    assert server.request.messages is not None
    called, result = server.request.messages[1:]
    assert called.more["tool_calls"][0]["function"]["arguments"] == {"city": "Ur"}
    assert (result.role, result.content) == ("tool", "dry")
    assert result.more == {"tool_call_id": "a", "name": "weather"}


@pytest.mark.parametrize(
    ("wanted", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, '"{"'),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}, '\\"n\\"'),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": False}}, '\\"n\\"'),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, '"{"'),
    ],
)
def test_formats(wanted: dict[str, Any], grammar: str | None) -> None:
    server = Server('{"n": 1}')
    server.choice(tools=None, response_format=wanted)
    found = server.request.sampling.grammar
    assert (found is None) if grammar is None else (found is not None and grammar in found)


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def schema_format(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


def deep() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(60):
        found = {"items": [found]}
    return found


ODD = {"type": "object", "properties": {"a": {"not": {}}}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [function(name="a b")]}, "tools[0].function", "function name 'a b'"),
        ({"tools": [WEATHER, function(parameters={"type": "array"})]}, "tools[1].function", "an object's schema"),
        ({"tools": [function(parameters=ODD, strict=True)]}, "tools[0].function", "#/properties/a"),
        ({"tools": [function(parameters=ODD)], "tool_choice": "required"}, "tools", "#/properties/a"),
        ({"tools": [function(parameters="{}")]}, "tools[0].function.parameters", "dictionary"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "two tools have the name weather"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search are not supported"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "with tools"),
        ({"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "there is none of this name"),
        ({"tool_choice": "required", "grammar": 'root ::= "a"'}, "grammar", "a tool that must be called"),
        ({"tools": [TIME] * 129}, "tools", "at most 128"),
        ({"tools": [function(parameters=deep())]}, "tools[0].function.parameters", "nested more than 100 deep"),
        ({"functions": [{"name": "f"}]}, "functions", "give tools"),
        ({"function_call": "auto"}, "function_call", "give tools"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (schema_format(name="a b"), "response_format.json_schema.name", "pattern"),
        (schema_format(name="a", schema=ODD), "response_format", "#/properties/a"),
        ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "grammar", "response_format"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_to_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    server = Server()
    answer = server.ask(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert server.engine.requests == []
