"""``/v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ziggurat.runtime.server.schemas.common import AnswerModel, RequestModel

_Tokens = Annotated[list[int], Field(min_length=1)]
_MAX_TEXTS = 2048


class EmbeddingsRequest(RequestModel):
    """Texts, or their tokens, to make vectors of."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MAX_TEXTS)]
        | _Tokens
        | Annotated[list[_Tokens], Field(min_length=1, max_length=_MAX_TEXTS)]
    )
    model: str | None = Field(None, description="Default: the model that is served.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64 is of little-endian float32 values. Default: float."
    )
    dimensions: int | None = Field(
        None, ge=1, description="The model's own number, or nothing: vectors are not cut to other ones."
    )
    user: str | None = None

    def texts(self) -> list[str | list[int]]:
        """Return the texts, each as it is or as tokens."""
        given: list[Any] = self.input if isinstance(self.input, list) else [self.input]
        return [given] if isinstance(given[0], int) else given


class Embedding(AnswerModel):
    """The vector of one text, of length 1; in base64 if that was asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(AnswerModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsList(AnswerModel):
    """The vectors of all texts, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
