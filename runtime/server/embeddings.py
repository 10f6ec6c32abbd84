"""``POST /v1/embeddings``."""

from __future__ import annotations

import base64
import functools
import threading
from typing import Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ziggurat.runtime.engine import Embeddings
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.server.errors import ApiError, api_error
from ziggurat.runtime.server.generation import attended
from ziggurat.runtime.server.record import record_of
from ziggurat.runtime.server.schemas.embeddings import EmbeddingsList, EmbeddingsRequest
from ziggurat.runtime.server.state import ServerState, State

router = APIRouter(tags=["OpenAI"])

# requests that wait in the engine at a time, each in a thread; the others wait for one of them
_AT_ONCE = 4


@router.post("/v1/embeddings", response_model=EmbeddingsList)
async def embeddings(request: Request, body: EmbeddingsRequest, state: State) -> Response:
    """Make a vector of each text. The server must have been started with --embeddings."""
    model = state.model(body.model)
    size = state.info.embedding_size
    if size is None:
        raise ApiError(400, "this server makes no embeddings: start it with --embeddings", code="embeddings_disabled")
    if body.dimensions not in (None, size):
        raise ApiError(
            400,
            f"dimensions is {body.dimensions}; this model's vectors have {size}, and are not cut: that would change"
            " what they are close to",
            param="dimensions",
            code="invalid_value",
        )
    found = await attended(request, _embed(request, state, body))
    record = record_of(request.scope)
    record.model, record.prompt_tokens = model, found.prompt_tokens
    vectors = map(_base64 if body.encoding_format == "base64" else _floats, found.vectors)
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)],
        "model": model,
        "usage": {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens},
    }
    return JSONResponse(answer)


async def _embed(request: Request, state: ServerState, body: EmbeddingsRequest) -> Embeddings:
    app = request.app
    limiter: anyio.CapacityLimiter | None = getattr(app.state, "embedding_limiter", None)
    if limiter is None:  # belongs to an event loop, so that it cannot be made before there is one
        limiter = app.state.embedding_limiter = anyio.CapacityLimiter(_AT_ONCE)
    left = threading.Event()
    work = functools.partial(state.engine.embed, body.texts(), wanted=lambda: not left.is_set())
    try:
        return await anyio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)
    except InvalidRequestError as error:
        raise api_error(error, "input") from error
    finally:
        left.set()


def _floats(vector: Any) -> list[float]:
    values: list[float] = vector.tolist()
    return values


def _base64(vector: Any) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
