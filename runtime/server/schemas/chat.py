"""``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ziggurat.runtime.server.schemas.common import (
    AnswerModel,
    GenerationFields,
    RequestModel,
    TextPart,
    Timings,
    Usage,
)
from ziggurat.runtime.server.schemas.tools import (
    MAX_TOOLS,
    ChatTool,
    ChatToolChoice,
    MadeToolCall,
    OlderTools,
    ResponseFormat,
    ToolCall,
    ToolCallDelta,
)


class ChatMessage(RequestModel):
    """One turn. All but an assistant's that calls tools have content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal is not None)):
            raise PydanticCustomError("missing", "a message of role {role} needs content", {"role": self.role})
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("missing", "a message of role tool needs tool_call_id")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only messages of role assistant have tool_calls")
        return self

    def text(self) -> str:
        """Return the content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content if self.content is not None else self.refusal or ""


class ChatRequest(GenerationFields):
    """A conversation to go on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Default: until the model ends.")
    max_tokens: int | None = Field(default=None, ge=1, description="The older name of max_completion_tokens.")
    tools: Annotated[list[ChatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ChatToolChoice | None = Field(
        default=None, description="Default: auto with tools. Named or required calls fit their functions' schemas."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false: at most one call. Default: true.")
    functions: OlderTools = Field(default=None, description="Refused: give tools.")
    function_call: OlderTools = Field(default=None, description="Refused: give tool_choice.")
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


class LogprobEntry(AnswerModel):
    """A token and the logarithm of its probability; ``bytes`` are its own, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LogprobEntry):
    """A token that was chosen, and the likeliest ones in its place."""

    top_logprobs: list[LogprobEntry]


class ChatLogprobs(AnswerModel):
    """Log-probabilities of the tokens of a choice."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(AnswerModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[MadeToolCall] | None = None


class ChatChoice(AnswerModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    timings: Timings | None = None


class ChatCompletion(AnswerModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings | None = None


class Delta(AnswerModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(AnswerModel):
    """What is new of one answer, and at its end why it ended."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(AnswerModel):
    """The data of an event of a stream; the last one is followed by ``[DONE]``."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None
