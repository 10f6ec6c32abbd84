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
from ziggurat.runtime.errors import EngineError
from ziggurat.runtime.server.app import create_app
from ziggurat.runtime.server.schemas.responses import ResponseObject

WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ur"}}\n</tool_call>'
JSON = {"Content-Type": "application/json"}
IMAGE = {"type": "input_image", "image_url": "data:"}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


class Server:
    """A server over an engine that says a text, a few characters at a time."""

    def __init__(self, text: str = "Dry as ever.", template: str | None = tool_templates.HERMES) -> None:
        pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
        self.engine = FakeEngine(pieces, info=replace(INFO, chat_template=template))
        self.client = TestClient(create_app(self.engine))

    def ask(self, **fields: Any) -> Any:
        return self.client.post("/v1/responses", json={"input": "Rain?", **fields})

    def response(self, **fields: Any) -> dict[str, Any]:
        answer = self.ask(**fields)
        assert answer.status_code == 200, answer.text
        ResponseObject.model_validate(answer.json())
        found: dict[str, Any] = answer.json()
        return found

    def events(self, **fields: Any) -> list[dict[str, Any]]:
        events = []
        for block in self.ask(stream=True, **fields).text.split("\n\n")[:-1]:
            *kind, data = block.splitlines()
            events.append(json.loads(data.removeprefix("data: ")))
            if kind:
                assert kind == [f"event: {events[-1]['type']}"]
        return events

    @property
    def messages(self) -> list[tuple[str, str]]:
        messages = self.engine.requests[-1].messages
        assert messages is not None
        return [(message.role, message.content) for message in messages]


def test_a_text_for_a_text() -> None:
    server = Server()
    response = server.response(instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, store=True)
    assert server.messages == [("system", "Be brief."), ("user", "Rain?")]
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "Dry as ever.", "annotations": [], "logprobs": []}]
    assert response["status"] == "completed" and response["error"] is None and response["store"] is False
    assert (response["temperature"], response["metadata"]) == (0.5, {"a": "b"})
    assert response["usage"] == {
        "input_tokens": 2,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 2},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 6,
    }


def test_the_limit_leaves_it_incomplete() -> None:
    response = Server().response(max_output_tokens=2)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (response["output"][0]["status"], response["output"][0]["content"][0]["text"]) == ("incomplete", "Dry as")
    assert response["completed_at"] is None


def test_nothing_is_an_empty_message() -> None:
    assert Server("").response()["output"][0]["content"][0]["text"] == ""


def test_calls_are_items() -> None:
    server = Server("So. " + CALL)
    response = server.response(tools=[WEATHER])
    said, call = response["output"]
    assert said["content"][0]["text"] == "So."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", '{"city": "Ur"}')
    assert call["status"] == "completed" and call["call_id"].startswith("call_") and call["id"].startswith("fc_")
    assert response["tools"] == [{"description": None, "strict": None, **WEATHER}]
    assert response["tool_choice"] == "auto" and response["parallel_tool_calls"] is True
    (tool,) = server.engine.requests[-1].tools
    assert tool["function"]["parameters"] == WEATHER["parameters"]


def test_a_forced_call_has_a_grammar() -> None:
    server = Server(CALL)
    choice = {"type": "function", "name": "weather"}
    assert server.response(tools=[WEATHER], tool_choice=choice)["tool_choice"] == choice
    assert '\\"city\\"' in (server.engine.requests[-1].sampling.grammar or "")
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [choice]}
    server.response(tools=[WEATHER, {"type": "function", "name": "time"}], tool_choice=allowed)
    assert [tool["function"]["name"] for tool in server.engine.requests[-1].tools] == ["weather"]


def test_items_become_messages() -> None:
    server = Server()
    call = {"type": "function_call", "id": "fc_1", "name": "weather", "arguments": "{}", "status": "completed"}
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": text} for text in ("Rain ", "today?")]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Hm.", "annotations": []}, {"type": "refusal", "refusal": "No."}]},
        {**call, "call_id": "a"},
        {**call, "call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": "dry"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "wet"}]},
        {**call, "call_id": "c"},
    ]  # fmt: skip
    server.response(input=items, instructions="Be brief.")
    assert server.messages == [
        ("system", "Be brief.\n\nBe kind."),
        ("user", "Rain today?"),
        ("assistant", "Hm.No."),
        ("tool", "dry"),
        ("tool", "wet"),
        ("assistant", ""),
    ]
    messages = server.engine.requests[-1].messages
    assert messages is not None
    assert [len(message.more.get("tool_calls", ())) for message in messages] == [0, 0, 2, 0, 0, 1]


def test_what_a_response_held_goes_in_again() -> None:
    server = Server("So. " + CALL)
    output = server.response(tools=[WEATHER])["output"]
    result = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "dry"}
    server.response(input=[{"role": "user", "content": "Rain?"}, *output, result])
    assert [role for role, _ in server.messages] == ["user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("text", "grammar"),
    [
        ({"verbosity": "low"}, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, '"{"'),
        ({"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}, '\\"n\\"'),
    ],
)
def test_formats(text: dict[str, Any], grammar: str | None) -> None:
    server = Server('{"n": 1}')
    assert server.response(text=text)["text"]["format"]["type"] == text.get("format", {"type": "text"})["type"]
    found = server.engine.requests[-1].sampling.grammar
    assert (found is None) if grammar is None else (found is not None and grammar in found)


def test_events_of_a_text() -> None:
    events = Server("Dry as").events()
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(10))
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert [event["delta"] for event in events[4:6]] == ["Dry", " as"]
    assert events[2]["item"] == {**events[8]["item"], "status": "in_progress", "content": []}
    assert events[3]["part"]["text"] == "" and events[7]["part"]["text"] == "Dry as" == events[6]["text"]
    ids = {event["item_id"] for event in events[3:8]}
    assert ids == {events[8]["item"]["id"]} and events[9]["response"]["output"] == [events[8]["item"]]


def test_events_of_calls() -> None:
    events = Server("So. " + CALL + "\n" + CALL + "Well.").events(tools=[WEATHER])
    added = [(event["output_index"], event["item"]["type"]) for event in events if event["type"].endswith("item.added")]
    assert added == [(0, "message"), (1, "function_call"), (2, "function_call"), (3, "message")]
    first = [event for event in events if event.get("output_index") == 1]
    deltas = [event["delta"] for event in first if event["type"].endswith("arguments.delta")]
    (done,) = [event for event in first if event["type"].endswith("arguments.done")]
    assert len(deltas) > 2 and "".join(deltas) == done["arguments"] == '{"city": "Ur"}' and done["name"] == "weather"
    statuses = [item["status"] for item in events[-1]["response"]["output"]]
    assert statuses == ["completed"] * 4


def test_a_failure_in_mid_stream() -> None:
    def script(_request: GenerationRequest) -> Iterator[str]:
        yield "Dry"
        raise EngineError("it broke")

    server = Server()
    server.engine._script = script
    *_, failed, error = server.events()
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "engine_error", "message": "it broke"}
    assert error["error"]["message"] == "it broke"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is kept between requests"),
        ({"conversation": "conv_1"}, "conversation", "nothing is kept"),
        ({"prompt": {"id": "p"}}, "prompt", "nothing is kept"),
        ({"background": True}, "background", "True is not supported"),
        ({"truncation": "auto"}, "truncation", "auto is not supported"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": 3}, "input", ""),
        ({"input": [{"type": "reasoning"}]}, "input", "no messages"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "a type that is supported"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type", "input_image parts"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'user'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search are not supported"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0]", "function name"),
        ({"tool_choice": "required"}, "tool_choice", "with tools"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format", "not"),
        ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name", ""),
        ({"model": "other"}, "model", "does not exist"),
    ],
)  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    server = Server()
    answer = server.ask(**fields)
    error = answer.json()["error"]
    assert error["param"] == param and answer.status_code in (400, 404), error
    assert message in error["message"]
    assert server.engine.requests == []


def test_what_is_no_text_is_told_as_it_came() -> None:
    parameters = {"type": "object", "description": "\ud800"}
    body = {"input": "a", "tools": [{**WEATHER, "parameters": parameters}], "tool_choice": "none"}
    answer = Server().client.post("/v1/responses", content=json.dumps(body), headers=JSON)
    assert answer.json()["tools"][0]["parameters"] == parameters


def test_models_without_a_template() -> None:
    engine = FakeEngine(info=replace(INFO, has_chat_template=False))
    answer = TestClient(create_app(engine)).post("/v1/responses", json={"input": "a"})
    assert answer.status_code == 400 and "/v1/completions" in answer.json()["error"]["message"]


def test_templates_without_tools() -> None:
    server = Server('{"tool_calls": [{"name": "weather", "arguments": {}}]}', templates.CHATML)
    assert server.response(tools=[WEATHER])["output"][0]["name"] == "weather"
