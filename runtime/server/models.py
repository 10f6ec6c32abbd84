"""``GET /v1/models`` and ``/v1/models/{id}``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ziggurat.runtime.server.schemas.models import ModelList, ModelObject
from ziggurat.runtime.server.state import ServerState, State

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", response_model=ModelList)
async def list_models(state: State) -> Any:
    """List the names that the model is served under."""
    return {"object": "list", "data": [_model(state, name) for name in state.models]}


@router.get("/v1/models/{model:path}", response_model=ModelObject)
async def show_model(model: str, state: State) -> Any:
    """Describe the model."""
    return _model(state, state.model(model))


def _model(state: ServerState, name: str) -> dict[str, Any]:
    info = state.info
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "ziggurat",
        "meta": {
            "description": info.description,
            "n_params": info.n_params,
            "size": info.n_bytes,
            "n_vocab": info.n_vocab,
            "n_ctx": info.n_ctx,
            "n_ctx_train": info.n_ctx_train,
            "embedding_size": info.embedding_size,
        },
    }
