"""``/v1/models``."""

from __future__ import annotations

from typing import Literal

from ziggurat.runtime.server.schemas.common import AnswerModel


class ModelMeta(AnswerModel):
    """Extension: what is known of the model; sizes in bytes, the context in tokens of one conversation."""

    description: str
    n_params: int
    size: int
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    embedding_size: int | None


class ModelObject(AnswerModel):
    """A name that the model is served under."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    meta: ModelMeta


class ModelList(AnswerModel):
    """All names."""

    object: Literal["list"]
    data: list[ModelObject]
