"""Puts tools, and the calls and results of earlier turns, into the messages of a prompt as templates want them.

Messages come in as OpenAI's chat completions have them: ``tool_calls`` (with arguments as a JSON text) on those of the
assistant, ``tool_call_id`` on those of the role ``tool``. Templates want arguments as objects, some take ids of a
certain shape only, or one call in a message; and those that know no tools get plain messages.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ziggurat.runtime.engine import Message
from ziggurat.runtime.server.tools.definitions import Function
from ziggurat.runtime.server.tools.forms import Form

_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
_SYSTEM = ("system", "developer")

_INSTRUCTIONS = """\
You can call functions. These are described by JSON, one on each line:
{functions}

To call one or more of them, answer with nothing but a JSON object of this form:
{{"tool_calls": [{{"name": "<the function's name>", "arguments": {{<its arguments as its parameters say>}}}}]}}
What they return is in the next message. When no call is needed, answer with text as usual."""


def written(messages: Sequence[Message], form: Form) -> tuple[Message, ...]:
    """Return the messages of a conversation as the form's templates want them."""
    names = _names_of_calls(messages)
    if form.native:
        return tuple(_native(messages, form, names))
    return tuple(_plain(messages, names))


def instructed(
    messages: Sequence[Message], functions: Sequence[Function], *, system: bool, more: str = ""
) -> tuple[Message, ...]:
    """Return messages that describe functions, for templates that do not; ``more`` is said after it.

    In the first system message where there is one; else in a new one, or without ``system`` messages in the template,
    before the first message.
    """
    lines = (json.dumps(function.as_mapping()["function"], ensure_ascii=False) for function in functions)
    text = _INSTRUCTIONS.format(functions="\n".join(lines)) + (f" {more}" if more else "")
    first = messages[0]
    if first.role in _SYSTEM or not system:
        content = f"{first.content}\n\n{text}" if first.role in _SYSTEM else f"{text}\n\n{first.content}"
        return replace(first, content=content), *messages[1:]
    return Message("system", text), *messages


def _names_of_calls(messages: Sequence[Message]) -> dict[str, str]:
    """Return the names of the functions by the ids of their calls."""
    return {
        call["id"]: call["function"]["name"] for message in messages for call in message.more.get("tool_calls") or ()
    }


def _native(messages: Sequence[Message], form: Form, names: Mapping[str, str]) -> Iterator[Message]:
    waiting: dict[str, Message] = {}  # calls of one message that get a message each, by their ids
    for message in messages:
        calls = message.more.get("tool_calls")
        if message.role == "tool":
            call_id = message.more.get("tool_call_id", "")
            if call_id in waiting:
                yield waiting.pop(call_id)
            more = {"name": names.get(call_id, ""), **message.more, "tool_call_id": _id(call_id, form)}
            yield replace(message, more={key: value for key, value in more.items() if value})
            continue
        yield from waiting.values()
        waiting = {}
        if not calls:
            yield replace(message, more={key: value for key, value in message.more.items() if key != "tool_calls"})
            continue
        now = [_call(call, form) for call in calls]
        if form.one_call:
            later = zip(calls[1:], now[1:], strict=True)
            waiting = {call["id"]: replace(message, content="", more={"tool_calls": [one]}) for call, one in later}
            now = now[:1]
        yield replace(message, more={**message.more, "tool_calls": now})
    yield from waiting.values()


def _call(call: Mapping[str, Any], form: Form) -> dict[str, Any]:
    function = {"name": call["function"]["name"], "arguments": _object(call["function"]["arguments"])}
    return {"id": _id(call["id"], form), "type": "function", "function": function}


def _object(arguments: str) -> Any:
    """Return arguments as an object where they are one: the client may send back what was broken."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _id(call_id: str, form: Form) -> str:
    """Return an id as the form's templates take it; the same one for the same id."""
    if not form.short_ids or _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", errors="surrogatepass")).hexdigest()[:9]


def _plain(messages: Sequence[Message], names: Mapping[str, str]) -> Iterator[Message]:
    """Write calls as text, and results with what the user says then: many templates want the two to take turns."""
    results: list[str] = []
    for message in messages:
        if message.role == "tool":
            call_id = message.more.get("tool_call_id", "")
            name = names.get(call_id) or message.more.get("name") or call_id
            results.append(f"The function {name} returned:\n{message.content}")
            continue
        if results:
            if message.role == "user":
                message = replace(message, content="\n\n".join([*results, message.content]))
            else:
                yield Message("user", "\n\n".join(results))
            results = []
        calls = message.more.get("tool_calls")
        if not calls:
            yield message
            continue
        functions = [call["function"] for call in calls]
        said = [{"name": each["name"], "arguments": _object(each["arguments"])} for each in functions]
        text = json.dumps({"tool_calls": said}, ensure_ascii=False)
        yield Message(message.role, f"{message.content}\n{text}" if message.content else text)
    if results:
        yield Message("user", "\n\n".join(results))
