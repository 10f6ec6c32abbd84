"""``/v1/responses``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ziggurat.runtime.server.schemas.common import AnswerModel, RequestModel, SamplingFields
from ziggurat.runtime.server.schemas.tools import (
    MAX_TOOLS,
    FunctionFields,
    FunctionType,
    JSONObjectFormat,
    SchemaFields,
    TextFormat,
)


def _text_part(kind: Any) -> Any:
    if isinstance(kind, str) and kind not in ("input_text", "output_text"):
        raise PydanticCustomError(
            "unsupported_part", "{kind} parts are not supported: the model reads text", {"kind": kind}
        )
    return kind


class InputPart(RequestModel):
    """A piece of a message's text."""

    type: Annotated[Literal["input_text", "output_text"], BeforeValidator(_text_part)]
    text: str


class RefusalPart(RequestModel):
    """What the model would not do."""

    type: Literal["refusal"]
    refusal: str


def _part_kind(part: Any) -> str:
    return "refusal" if isinstance(part, dict) and part.get("type") == "refusal" else "text"


Part = Annotated[Annotated[InputPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")], Discriminator(_part_kind)]


def joined(content: str | list[InputPart] | list[Part]) -> str:
    """Return the text of a content."""
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, InputPart) else part.refusal for part in content)


class InputMessage(RequestModel):
    """A message, also one of an earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class InputCall(RequestModel):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputResult(RequestModel):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart]


class InputReasoning(RequestModel):
    """What a model thought, which no prompt has."""

    type: Literal["reasoning"]


_KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _item_kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    return kind if kind in _KINDS else None


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _item_kind,
        custom_error_type="unsupported_item",
        custom_error_message="items are objects of a type that is supported: " + ", ".join(_KINDS),
    ),
]


class OfType(RequestModel):
    """What says that it is a function."""

    type: FunctionType


class ResponseTool(FunctionFields, OfType):
    """A tool: a function."""


class NamedFunction(OfType):
    """One of the tools."""

    name: str


class AllowedFunctions(RequestModel):
    """A choice of several tools, and whether one of them must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction]


class NamedSchema(SchemaFields):
    """JSON that fits a schema."""

    type: Literal["json_schema"]


class TextFields(RequestModel):
    """The format of the answer's text."""

    format: Annotated[TextFormat | JSONObjectFormat | NamedSchema, Field(discriminator="type")] | None = None


def _stateless(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("stateless", "is not supported: nothing is kept between requests; give all as input")
    return value


def _not_so(value: Any) -> Any:
    if value not in (None, False, "disabled"):
        raise PydanticCustomError("unsupported", "{value} is not supported", {"value": str(value)})
    return value


class ResponsesRequest(SamplingFields):
    """What to answer. Nothing is stored."""

    model: str | None = Field(default=None, description="Default: the model that is served.")
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, description="Default: until the model ends.")
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="false: at most one call. Default: true.")
    text: TextFields | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[str] | None = Field(
        default=None, description="message.output_text.logprobs asks for log-probabilities; others are ignored."
    )
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = Field(default=None, description="Ignored: nothing is stored.")
    previous_response_id: Annotated[str | None, BeforeValidator(_stateless)] = Field(None, description="Refused.")
    conversation: Annotated[Any, BeforeValidator(_stateless)] = Field(None, description="Refused.")
    prompt: Annotated[Any, BeforeValidator(_stateless)] = Field(None, description="Refused.")
    background: Annotated[bool | None, BeforeValidator(_not_so)] = Field(None, description="true is refused.")
    truncation: Annotated[Literal["disabled"] | None, BeforeValidator(_not_so)] = Field(
        None, description="auto is refused: prompts are never cut."
    )


class OutputTopLogprob(AnswerModel):
    """A token that was likely, and its own bytes."""

    token: str
    logprob: float
    bytes: list[int]


class OutputLogprob(OutputTopLogprob):
    """A token that was chosen, and the likeliest ones in its place."""

    top_logprobs: list[OutputTopLogprob]


class OutputText(AnswerModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[OutputLogprob]


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(AnswerModel):
    """What the model said."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class OutputCall(AnswerModel):
    """A function that the model calls; ``call_id`` names the call when its result is sent."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class InputTokensDetails(AnswerModel):
    """Of the tokens that were read, those whose rows were there already."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(AnswerModel):
    """No difference is made."""

    reasoning_tokens: int


class ResponseUsage(AnswerModel):
    """Tokens that were read and generated."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(AnswerModel):
    """What went wrong while it was made."""

    code: str
    message: str


class IncompleteDetails(AnswerModel):
    """Why it has no end."""

    reason: Literal["max_output_tokens"]


class ResponseObject(AnswerModel):
    """An answer, and what was asked."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int | None
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
    store: bool
    background: bool
