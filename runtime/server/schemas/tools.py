"""Tools, which of them to call, calls, and the format of answers, as chat completions have them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ziggurat.runtime.server.schemas.common import AnswerModel, RequestModel

#: Tools of one request, at most.
MAX_TOOLS = 128
_MAX_DEPTH = 100


def function_only(kind: Any) -> Any:
    """Refuse tools that are no functions, by name."""
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            "unsupported_tool", "tools of type {kind} are not supported, only functions", {"kind": kind}
        )
    return kind


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is nested deeper than anything that walks through it likes."""
    level: list[Any] = [schema]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return schema
    raise PydanticCustomError("too_deep", "is nested more than {most} deep", {"most": _MAX_DEPTH})


JSONSchema = Annotated[dict[str, Any], AfterValidator(_shallow)]
FunctionType = Annotated[Literal["function"], BeforeValidator(function_only)]


class FunctionFields(RequestModel):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: JSONSchema | None = Field(
        default=None, description="The JSON schema of its arguments, an object's. Default: no arguments."
    )
    strict: bool | None = Field(default=None, description="Refuses schemas that no grammar can be made of.")


class ChatTool(RequestModel):
    """A tool: a function."""

    type: FunctionType
    function: FunctionFields


class FunctionName(RequestModel):
    """The name of a function among the tools."""

    name: str


class NamedTool(RequestModel):
    """One of the tools."""

    type: FunctionType
    function: FunctionName


class AllowedTools(RequestModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedChoice(RequestModel):
    """A choice of several tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _not_any_more(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported any more: give tools and tool_choice")
    return value


#: What tools were before they were tools. To ignore it would be to call nothing.
OlderTools = Annotated[Any, BeforeValidator(_not_any_more)]
ChatToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice


class CalledFunction(RequestModel):
    """A call that the model made: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(RequestModel):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class MadeCall(AnswerModel):
    """A call that the model makes: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


class MadeToolCall(AnswerModel):
    """A call in an answer."""

    id: str
    type: Literal["function"]
    function: MadeCall


class CallDelta(AnswerModel):
    """What is new of a call: its name, once, and pieces of its arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(AnswerModel):
    """What is new of the ``index``-th call; ``id`` and ``type`` come once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CallDelta


class TextFormat(RequestModel):
    """Any text."""

    type: Literal["text"]


class JSONObjectFormat(RequestModel):
    """A JSON object."""

    type: Literal["json_object"]


class SchemaFields(RequestModel):
    """A JSON schema with a name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: JSONSchema | None = Field(
        default=None, alias="schema", description="What answers fit. Default: any JSON object."
    )
    strict: bool | None = Field(default=None, description="No difference: answers always fit the schema.")


class JSONSchemaFormat(RequestModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaFields


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")]
