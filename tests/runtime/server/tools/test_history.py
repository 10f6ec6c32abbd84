from __future__ import annotations

import json
from typing import Any

import pytest

from helpers import templates, tool_templates
from ziggurat.runtime.chat_template import ChatTemplate
from ziggurat.runtime.engine import Message
from ziggurat.runtime.server.tools.definitions import Function, Tools
from ziggurat.runtime.server.tools.use import ToolUse

WEATHER = Function("weather", "tells the weather", {"type": "object", "properties": {"city": {"type": "string"}}})


def call(call_id: str, city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {"id": call_id, "type": "function", "function": function}


ASKED = (
    Message("user", "Rain?"),
    Message("assistant", "", {"tool_calls": [call("call_0123456789", "Ur"), call("call_b", "Uruk")]}),
    Message("tool", "dry", {"tool_call_id": "call_0123456789"}),
    Message("tool", "wet", {"tool_call_id": "call_b"}),
    Message("user", "Thanks."),
)


def prompt(template: str, messages: tuple[Message, ...] = ASKED, mode: Any = "auto") -> str:
    use = ToolUse.of(template, Tools((WEATHER,), mode))
    said = [message.as_mapping() for message in use.messages(messages)]
    return ChatTemplate(template, bos="<s>", eos="</s>").render(said, tools=use.definitions() or None)


def test_hermes() -> None:
    text = prompt(tool_templates.HERMES)
    assert '"description": "tells the weather"' in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Ur"}}\n</tool_call>\n<tool_call>' in text
    assert "<tool_response>\nwet\n</tool_response>" in text


def test_llama_takes_one_call_in_a_message() -> None:
    text = prompt(tool_templates.LLAMA)
    assert '"description": "tells the weather"' in text
    order = [
        '{"name": "weather", "parameters": {"city": "Ur"}}',
        '"dry"',
        '"parameters": {"city": "Uruk"}',
        '"wet"',
        "Thanks",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_llama_calls_without_results_stay() -> None:
    text = prompt(tool_templates.LLAMA, (ASKED[0], ASKED[1], ASKED[4]))
    assert text.index('"Ur"') < text.index('"Uruk"') < text.index("Thanks")


@pytest.mark.parametrize(
    ("template", "written"),
    [(tool_templates.MISTRAL, '"id": "{}"'), (tool_templates.MISTRAL_NAMED, '[CALL_ID]{}[ARGS]{{"city": "Ur"}}')],
)  # fmt: skip
def test_mistral_takes_ids_of_nine_characters(template: str, written: str) -> None:
    text = prompt(template)
    call_id = ToolUse.of(template, Tools()).messages(ASKED)[2].more["tool_call_id"]
    assert len(call_id) == 9 and call_id.isalnum()
    assert written.format(call_id) in text and "call_0123456789" not in text
    kept = (ASKED[0], Message("assistant", "", {"tool_calls": [call("abcDEF123", "Ur")]}))
    assert "abcDEF123" in prompt(template, kept)


def test_templates_without_tools_get_text() -> None:
    text = prompt(templates.CHATML)
    assert text.startswith("<|im_start|>system\nYou can call functions.") and "tells the weather" in text
    assert '<|im_start|>assistant\n{"tool_calls": [{"name": "weather", "arguments": {"city": "Ur"}}, ' in text
    assert (
        "user\nThe function weather returned:\ndry\n\nThe function weather returned:\nwet\n\nThanks.<|im_end|>" in text
    )
    assert text.count("<|im_start|>system") == 1 and "You must" not in text


def test_instructions_follow_the_system_message_or_come_first() -> None:
    with_system = (Message("system", "Be kind."), *ASKED)
    assert "system\nBe kind.\n\nYou can call functions." in prompt(templates.CHATML, with_system)
    assert "[INST] You can call functions." in prompt(templates.GEMMA.replace("<start_of_turn>", "[INST] ")).replace(
        "[INST] user\n", "[INST] "
    )


def test_results_before_no_question_are_a_message() -> None:
    said = ToolUse.of(None, Tools()).messages((*ASKED[:3], Message("assistant", "Dry."), *ASKED[3:4]))
    assert [(message.role, message.content[:12]) for message in said[2:]] == [
        ("user", "The function"),
        ("assistant", "Dry."),
        ("user", "The function"),
    ]


def test_a_call_is_demanded_where_the_template_cannot() -> None:
    assert "You must call weather now." in prompt(templates.CHATML, mode="required")


@pytest.mark.parametrize("template", [tool_templates.HERMES, tool_templates.LLAMA, templates.CHATML])
def test_no_tools_leave_messages_as_they_are(template: str) -> None:
    plain = (Message("system", "s"), Message("user", "The function f"), Message("assistant", "a", {"name": "x"}))
    assert ToolUse.of(template, Tools()).messages(plain) == plain
    assert "tells the weather" not in prompt(template, plain, "none")


def test_arguments_that_are_broken_stay_text() -> None:
    broken = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{oops"}}
    assert "{oops" in prompt(tool_templates.HERMES, (ASKED[0], Message("assistant", "", {"tool_calls": [broken]})))
