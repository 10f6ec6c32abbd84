"""What several endpoints have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class RequestModel(BaseModel):
    """A request's body, or a part of it: types are not converted, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class AnswerModel(BaseModel):
    """What is documented of an answer; answers themselves are written without it."""

    model_config = ConfigDict(extra="forbid")


def _text_part(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported_part", "{kind} parts are not supported: the model reads text", {"kind": kind}
        )
    return kind


class TextPart(RequestModel):
    """A piece of a message's text."""

    type: Annotated[Literal["text"], BeforeValidator(_text_part)]
    text: str


class StreamOptions(RequestModel):
    """What a stream carries besides the text."""

    include_usage: bool = False


Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
StopText = Annotated[str, Field(min_length=1)]


class SamplingFields(RequestModel):
    """How the next token is chosen: OpenAI's fields, and llama.cpp's samplers under llama.cpp's names."""

    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0 takes the likeliest token. Default: 0.8."
    )
    top_p: float | None = Field(default=None, ge=0, le=1, description="Default: 0.95.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="Of the first choice; the others' follow it."
    )
    logit_bias: dict[TokenKey, Bias] | None = Field(default=None, description="Added to the logits of token ids.")

    top_k: int | None = Field(default=None, description="Extension. Default: 40.")
    min_p: float | None = Field(default=None, description="Extension. Default: 0.05.")
    typical_p: float | None = Field(default=None, description="Extension.")
    top_n_sigma: float | None = Field(default=None, description="Extension.")
    min_keep: int | None = Field(default=None, description="Extension.")
    dynatemp_range: float | None = Field(default=None, description="Extension.")
    dynatemp_exponent: float | None = Field(default=None, description="Extension.")
    repeat_penalty: float | None = Field(default=None, description="Extension.")
    repeat_last_n: int | None = Field(default=None, description="Extension.")
    dry_multiplier: float | None = Field(default=None, description="Extension.")
    dry_base: float | None = Field(default=None, description="Extension.")
    dry_allowed_length: int | None = Field(default=None, description="Extension.")
    dry_penalty_last_n: int | None = Field(default=None, description="Extension.")
    dry_sequence_breakers: list[str] | None = Field(default=None, description="Extension.")
    xtc_probability: float | None = Field(default=None, description="Extension.")
    xtc_threshold: float | None = Field(default=None, description="Extension.")
    mirostat: int | None = Field(default=None, description="Extension.")
    mirostat_tau: float | None = Field(default=None, description="Extension.")
    mirostat_eta: float | None = Field(default=None, description="Extension.")
    ignore_eos: bool | None = Field(default=None, description="Extension.")
    grammar: str | None = Field(default=None, description="Extension: GBNF that bounds what is generated.")


class GenerationFields(SamplingFields):
    """What every request for generated text can hold."""

    model: str | None = Field(default=None, description="Default: the model that is served.")
    n: int | None = Field(default=None, ge=1, le=128, description="Choices to generate. Default: 1.")
    stop: StopText | Annotated[list[StopText], Field(min_length=1, max_length=4)] | None = Field(
        None, description="Generation ends before any of up to four texts."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    conversation: str | None = Field(
        None, min_length=1, max_length=256, description="Extension: a name to ask about the kept rows by later."
    )
    reread: bool | None = Field(default=None, description="Extension: go on only from rows of which none was evicted.")
    speculate: bool | None = Field(default=None, description="Extension: false leaves the draft unused.")

    def stop_texts(self) -> tuple[str, ...]:
        """Return the texts to end before."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CachedTokens(AnswerModel):
    """Of the prompt's tokens, those whose rows were there already."""

    cached_tokens: int


class Usage(AnswerModel):
    """Tokens that were read and generated, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Timings(AnswerModel):
    """Extension: how long it took, times in milliseconds, sizes in bytes. ``cache_n`` tokens were not read anew."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float
    draft_n: int
    draft_n_accepted: int
    queue_ms: float
    time_to_first_token_ms: float
    kv_bytes: int
    kv_bytes_full: int
    evicted_rows: int


class ErrorObject(AnswerModel):
    """What went wrong: ``param`` names the field it is about, ``code`` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(AnswerModel):
    """Every answer that is not a success."""

    error: ErrorObject
