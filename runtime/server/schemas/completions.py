"""``/v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from ziggurat.runtime.server.schemas.common import AnswerModel, GenerationFields, Timings, Usage

#: Prompts that one request can hold.
MAX_PROMPTS = 2048

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _prompt(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise PydanticCustomError(
            "prompt_type",
            "must be a string, a list of token ids, or a list of up to {most} of either; none of them empty",
            {"most": MAX_PROMPTS},
        ) from None


Tokens = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Prompt = Annotated[
    Text
    | Tokens
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)],
    WrapValidator(_prompt),
]


class CompletionRequest(GenerationFields):
    """Texts to go on with, as they are."""

    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=1, description="Default: 16.")
    best_of: int | None = Field(
        default=None, ge=1, le=128, description="Choices to generate, of which the n best are given."
    )
    echo: bool | None = Field(default=None, description="Begin each text with its prompt.")
    logprobs: int | None = Field(default=None, ge=0, le=5)
    suffix: str | None = Field(default=None, description="Not supported.")

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise PydanticCustomError("best_of", "best_of must be at least n")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class CompletionLogprobs(AnswerModel):
    """Log-probabilities of a text's tokens; ``text_offset`` are where they begin in it, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(AnswerModel):
    """One text, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    timings: Timings | None = None


class Completion(AnswerModel):
    """The texts; in a stream, what is new of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | None = None
