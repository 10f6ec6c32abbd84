"""From the fields about tools and formats in a request to what bounds the answer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ziggurat.runtime.engine import Engine
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.grammar import read_grammar
from ziggurat.runtime.json_schema import schema_grammar
from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.schemas.chat import ChatRequest
from ziggurat.runtime.server.schemas.responses import (
    AllowedFunctions,
    NamedFunction,
    NamedSchema,
    ResponsesRequest,
    TextFields,
)
from ziggurat.runtime.server.schemas.tools import (
    AllowedChoice,
    ChatToolChoice,
    FunctionFields,
    JSONObjectFormat,
    JSONSchemaFormat,
    NamedTool,
    TextFormat,
)
from ziggurat.runtime.server.tools.definitions import Function, Mode, Tools
from ziggurat.runtime.server.tools.use import ToolUse

Result = TypeVar("Result")

_ANY_OBJECT = '{"type": "object"}'


def refused(param: str, make: Callable[[], Result]) -> Result:
    """Return what ``make`` returns; what it refuses is about the field ``param``."""
    try:
        return make()
    except InvalidRequestError as error:
        raise ApiError(400, str(error), param=param, code="invalid_value") from None


def functions_of(given: Sequence[tuple[str, FunctionFields]]) -> tuple[Function, ...]:
    """Return the functions of a request, each given with its place in it. Raises ApiError naming this."""

    def function(fields: FunctionFields) -> Function:
        return Function(fields.name, fields.description, fields.parameters, bool(fields.strict))

    return tuple(refused(where, functools.partial(function, fields)) for where, fields in given)


def chat_tools(body: ChatRequest) -> Tools:
    """Return the tools of a chat. Raises ApiError."""
    given = [(f"tools[{index}].function", tool.function) for index, tool in enumerate(body.tools or ())]
    return tools_of(functions_of(given), *_choice(body.tool_choice), body.parallel_tool_calls, bool(body.tools))


def response_tools(body: ResponsesRequest) -> Tools:
    """Return the tools of a request for a response. Raises ApiError."""
    given = [(f"tools[{index}]", tool) for index, tool in enumerate(body.tools or ())]
    choice = body.tool_choice
    mode: Mode | None
    allowed: tuple[str, ...] | None
    if isinstance(choice, NamedFunction):
        mode, allowed = "required", (choice.name,)
    elif isinstance(choice, AllowedFunctions):
        mode, allowed = choice.mode, tuple(tool.name for tool in choice.tools)
    else:
        mode, allowed = choice, None
    return tools_of(functions_of(given), mode, allowed, body.parallel_tool_calls, bool(body.tools))


def _choice(choice: ChatToolChoice | None) -> tuple[Mode | None, tuple[str, ...] | None]:
    if isinstance(choice, NamedTool):
        return "required", (choice.function.name,)
    if isinstance(choice, AllowedChoice):
        return choice.allowed_tools.mode, tuple(tool.function.name for tool in choice.allowed_tools.tools)
    return choice, None


def tools_of(
    functions: tuple[Function, ...],
    mode: Mode | None,
    allowed: tuple[str, ...] | None,
    parallel: bool | None,
    given: bool,
) -> Tools:
    """Return tools with the choice among them, which needs that some were ``given``. Raises ApiError."""
    refused("tools", lambda: Tools(functions))
    if mode not in (None, "none") and not given:
        raise ApiError(400, "tool_choice is for requests with tools", param="tool_choice", code="invalid_value")
    several = parallel is not False and not (mode == "required" and allowed is not None and len(allowed) == 1)
    return refused("tool_choice", lambda: Tools(functions, mode or "auto", allowed, several))


def format_schema(wanted: TextFormat | JSONObjectFormat | JSONSchemaFormat | None) -> str | None:
    """Return the JSON schema (its text) that answers in a chat's format fit; None for any text."""
    if isinstance(wanted, JSONObjectFormat):
        return _ANY_OBJECT
    if isinstance(wanted, JSONSchemaFormat):
        return schema_text(wanted.json_schema.schema_)
    return None


def response_schema(text: TextFields | None) -> str | None:
    """Return the JSON schema (its text) that a response's text fits; None for any text."""
    wanted = None if text is None else text.format
    if isinstance(wanted, NamedSchema):
        return schema_text(wanted.schema_)
    return format_schema(wanted)


def schema_text(schema: Mapping[str, Any] | None) -> str:
    """Return a schema's text: any object's where there is none."""
    return _ANY_OBJECT if schema is None else json.dumps(schema)


def bounds(
    engine: Engine, use: ToolUse, schema: str | None, *, grammar: str | None, param: str
) -> dict[str, str | None]:
    """Return what sampling has to keep to: a grammar, of forced calls and of answers that fit a schema.

    ``grammar`` is the client's own, which goes with neither; the schema came in the field ``param``. Raises ApiError
    where it makes no grammar, or the schema of a function that has to be called makes none.
    """
    text = None if schema is None else refused(param, lambda: schema_grammar(schema))
    bound = refused("tools", lambda: use.grammar(functools.partial(_control_token, engine), text))
    if bound is None:
        return {}
    if grammar is not None:
        what = "a tool that must be called" if text is None else param
        raise ApiError(400, f"a grammar does not go with {what}", param="grammar", code="invalid_value")
    refused("tools" if use.tools.offered else param, lambda: read_grammar(bound))
    return {"grammar": bound}


def _control_token(engine: Engine, text: str) -> int | None:
    """Return the control token that is written so; None where letters write it, or a token whose text is shown."""
    tokens = engine.tokenize(text, parse_special=True)
    return tokens[0] if len(tokens) == 1 and engine.tokenize(text) != tokens else None
