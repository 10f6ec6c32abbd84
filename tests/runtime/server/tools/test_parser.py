from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.runtime.server.tools.deltas import ArgumentsDelta, CallDelta, TextDelta, new_id
from ziggurat.runtime.server.tools.forms import GENERIC, HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, Form
from ziggurat.runtime.server.tools.parser import ToolCallParser

FORMS = (HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, GENERIC)
F, G = ("f", '{"a": 1}'), ("g", "{}")
NESTED = '{"a": "}]</tool_call>[TOOL_CALLS]\\"", "b": [{"c": [-1.5e3, true, null]}]}'


def read(
    form: Form, text: str, cuts: tuple[int, ...] = (), *, eager: bool = False, single: bool = False
) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls, after checking that the deltas are in order."""
    ids = (f"id{number}" for number in itertools.count())
    parser = ToolCallParser(form, ("f", "g"), eager=eager, single=single, make_id=lambda: next(ids))
    ends = [*sorted(cuts), len(text)]
    deltas = [delta for start, end in zip([0, *ends], ends, strict=False) for delta in parser.feed(text[start:end])]
    deltas += parser.finish()
    said, calls = "", list[list[str]]()
    for delta in deltas:
        if isinstance(delta, TextDelta):
            assert delta.text
            said += delta.text
        elif isinstance(delta, CallDelta):
            assert (delta.index, delta.id) == (len(calls), f"id{len(calls)}")
            calls.append([delta.name, ""])
        else:
            assert delta.index == len(calls) - 1 and delta.text
            calls[-1][1] += delta.text
    assert parser.n_calls == len(calls)
    return said, [(name, arguments) for name, arguments in calls]


WELL_FORMED: list[tuple[Form, str, str, list[tuple[str, str]]]] = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [F]),
    (HERMES, '<tool_call> {"name":"f","arguments":{"a": 1}}</tool_call>\n<tool_call>{"name":"g"}\n', "", [F, G]),
    (HERMES, 'Let me see.\n\n<tool_call>{"arguments": {"a": 1}, "name": "f"}', "Let me see.", [F]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}\n{"name": "g"}</tool_call> so\n', " so\n", [F, G]),
    (HERMES, f'<tool_call>{{"name": "f", "arguments": {NESTED}}}</tool_call>', "", [("f", NESTED)]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [G]),
    (HERMES, '<tool_call>{"name": "\\u0066", "arguments": {"a": 1}}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_c', "", [F]),
    (HERMES, '<<tool_call>{"name": "g"}</tool_call>', "<", [G]),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [F]),
    (LLAMA, '\n{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "", [F, G]),
    (LLAMA, '<|python_tag|>{"type": "function", "function": "f", "parameters": {"a": 1}}', "", [F]),
    (LLAMA, 'Yes. <|python_tag|>{"name": "g", "parameters": {}}', "Yes.", [G]),
    (LLAMA, '{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}', "", [F]),
    (LLAMA, '<think>{"name": "g"}?</think>\n{"name": "g", "parameters": {}}', '<think>{"name": "g"}?</think>', [G]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', "", [F]),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "", [F, G]),
    (MISTRAL, 'So:[TOOL_CALLS][{"name": "g"}] and on', "So: and on", [G]),
    (MISTRAL_NAMED, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', "", [F, G]),
    (MISTRAL_NAMED, 'Hm. [TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS] {"a": 1}', "Hm.", [F]),
    (MISTRAL_NAMED, '[TOOL_CALLS]f{"a": 1}', "", [F]),
    (GENERIC, '{"tool_calls": [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]}', "", [F, G]),
    (GENERIC, '```json\n{"tool_calls":[{"name": "f", "arguments": {"a": 1}}]}\n```\n', "", [F]),
    (GENERIC, '{"tool_calls": [{"name": "g", "arguments": {}}]}\nDone.', "\nDone.", [G]),
]  # fmt: skip

# whatever is no call, or calls a function that there is not
TEXTS: list[tuple[Form, str]] = [
    *((form, text) for form in FORMS for text in ("", "Hi.", " \n", "{", '{"a": 1}', "<tool", "[", "```json\n1", "`")),
    (HERMES, '<tool_call>{"name": "h", "arguments": {}}</tool_call> x'),
    (HERMES, 'a \n <tool_call>{"name": "f", "arguments": {"a": </tool_call> y'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": 12}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": "text"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "name": "g"}</tool_call>'),
    (HERMES, '<tool_call>{"name": 1}</tool_call>'),
    (HERMES, '<tool_call>{"name": ["f"]}</tool_call>'),
    (HERMES, "<tool_call></tool_call><tool_call>"),
    (HERMES, '<tool_call>{"arguments": {"a": 01}}'),
    (HERMES, '<tool_call>{"arguments": {"a": "\n"}}'),
    (HERMES, '<tool_call>{"arguments": {"a": "\\x"}}'),
    (HERMES, '<tool_call>{"arguments": {"a": truth}}'),
    (HERMES, '<tool_call>{"arguments": {"a": [1}}}'),
    (HERMES, '<tool_call>{"arguments": ' + "[" * 200),
    (LLAMA, '{"name": "Ada", "age": 36}'),
    (LLAMA, '{"name": "f", "age": 36}'),
    (LLAMA, '<|python_tag|>print({"name": 1})'),
    (LLAMA, 'See {"name": "f", "parameters": {}}'),
    (MISTRAL, '[TOOL_CALLS] {"name": "f"}'),
    (MISTRAL, "[TOOL_CALLS] []"),
    (MISTRAL_NAMED, "[TOOL_CALLS]h[ARGS]{}"),
    (MISTRAL_NAMED, "[TOOL_CALLS]f[ARG]{}"),
    (MISTRAL_NAMED, "[TOOL_CALLS]f[ARGS][]"),
    (MISTRAL_NAMED, "[TOOL_CALLS]" + "f" * 100),
    (GENERIC, '{"tool_calls": []}'),
    (GENERIC, '{"tool_calls": {"name": "f"}}'),
    (GENERIC, '```json\n{"result": 1}\n```'),
]  # fmt: skip


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("form", "text", "said", "calls"), WELL_FORMED)
def test_calls_are_found_wherever_the_text_is_cut(
    form: Form, text: str, said: str, calls: list[tuple[str, str]], eager: bool
) -> None:
    assert read(form, text, eager=eager) == (said, calls)
    assert read(form, text, tuple(range(1, len(text))), eager=eager) == (said, calls)


@pytest.mark.parametrize(("form", "text"), TEXTS)
def test_what_is_no_call_is_text_to_the_last_character(form: Form, text: str) -> None:
    assert read(form, text) == (text, [])
    assert read(form, text, tuple(range(1, len(text)))) == (text, [])


def test_a_call_after_a_broken_one_is_found() -> None:
    broken = '<tool_call>{"name": "f", oops}</tool_call>'
    assert read(HERMES, broken + '<tool_call>{"name": "g"}</tool_call>') == (broken, [G])
    inner = '<tool_call><tool_call>{"name": "g"}</tool_call>'
    assert read(HERMES, inner) == ("<tool_call>", [G])
    assert read(MISTRAL, '[TOOL_CALLS][{"name": "g"}, {"name": "h"}]') == (', {"name": "h"}]', [G])
    assert read(LLAMA, '{"a": 1}<|python_tag|>{"name": "g"}') == ('{"a": 1}', [G])


def test_arguments_come_while_they_are_written() -> None:
    parser = ToolCallParser(HERMES, ["f"], eager=True, make_id=lambda: "id")
    assert parser.feed('<tool_call>{"name": "f", "arg') == []
    assert parser.feed('uments": {"a') == [CallDelta(0, "id", "f"), ArgumentsDelta(0, '{"a')]
    assert parser.feed('": 1}') == [ArgumentsDelta(0, '": 1}')]
    assert parser.feed("}</tool_call>") == parser.finish() == []


def test_what_breaks_after_it_was_passed_on_keeps_what_it_has() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": oops}</tool_call> <tool_call>{"name": "g"}</tool_call>'
    assert read(HERMES, text, eager=True) == ("oops}</tool_call>", [("f", '{"a": '), G])
    assert read(HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b', eager=True) == ("", [("f", '{"a": "b')])


def test_text_is_not_held_longer_than_it_may_be_a_call() -> None:
    parser = ToolCallParser(HERMES, ["f"])
    assert parser.feed("a <") == [TextDelta("a")]
    assert parser.feed("b") == [TextDelta(" <b")]
    assert parser.feed("<tool_call>{") == []
    assert parser.feed('"x') == []
    assert parser.feed('"') == [TextDelta('<tool_call>{"x"')]
    assert ToolCallParser(LLAMA, ["f"]).feed('{"na": ') == [TextDelta('{"na":')]


@pytest.mark.parametrize("eager", [False, True])
def test_a_single_call_is_the_last_thing(eager: bool) -> None:
    parser = ToolCallParser(HERMES, ["f", "g"], single=True, eager=eager)
    parser.feed('<tool_call>{"name": "f", "arguments": {}')
    assert not parser.finished
    parser.feed("}")
    assert parser.finished
    assert parser.feed('</tool_call><tool_call>{"name": "g"}</tool_call>') == parser.feed("x") == parser.finish() == []


def test_ids_are_as_templates_take_them() -> None:
    assert len({new_id(HERMES) for _ in range(100)}) == 100
    assert new_id(HERMES).startswith("call_")
    assert len(new_id(MISTRAL)) == 9 and new_id(MISTRAL).isalnum()


PIECES = [
    "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "</think>", "```",
    "```json", "f", "g", "[", "]", "{", "}", ",", ";", ":", " ", "\n", '"', "\\", "1", "true", '"name": "f"',
    '{"name": "g"}', '"arguments": {', '"parameters": {}', '{"name": "f", "arguments": {"a": 1}}', '{"tool_calls": [',
    "é", "text",
]  # fmt: skip
ANY_TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join)


@given(text=ANY_TEXT, form=st.sampled_from(FORMS), eager=st.booleans(), single=st.booleans(), data=st.data())
def test_cuts_make_no_difference(text: str, form: Form, eager: bool, single: bool, data: Any) -> None:
    cuts = tuple(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    assert read(form, text, cuts, eager=eager, single=single) == read(form, text, eager=eager, single=single)


@given(text=ANY_TEXT, form=st.sampled_from(FORMS))
def test_calls_are_whole_and_texts_without_calls_complete(text: str, form: Form) -> None:
    said, calls = read(form, text)
    if not calls:
        assert said == text
    for name, arguments in calls:
        assert name in ("f", "g") and isinstance(json.loads(arguments), dict)


NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(arguments=st.dictionaries(st.text(), JSON, max_size=4), eager=st.booleans(), ascii_only=st.booleans())
def test_any_arguments_arrive_as_they_were_written(arguments: dict[str, Any], eager: bool, ascii_only: bool) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    text = f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>'
    assert read(HERMES, text, eager=eager) == ("", [("f", written)])
