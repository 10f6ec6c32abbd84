"""Endpoints of our own: health, metrics, what is served and what it does, tokens, and the rows of conversations."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from ziggurat.runtime.engine import KeptRows
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.server.errors import ApiError, api_error
from ziggurat.runtime.server.metrics import CONTENT_TYPE
from ziggurat.runtime.server.phase import Phase
from ziggurat.runtime.server.schemas import native as schemas
from ziggurat.runtime.server.state import State

router = APIRouter(tags=["Ziggurat"])

Result = TypeVar("Result")

# numbers in an answer about kept rows, which would else be as large as the cache has rows
_MAX_RUNS = 200_000


@router.get("/health", response_model=schemas.Health)
async def health(request: Request) -> Any:
    """Tell whether requests are taken. Needs no API key."""
    phase: Phase = request.app.state.phase
    if phase.state != "ready":
        raise ApiError(503, f"the server is {phase.state}", code=f"server_{phase.state}", headers={"Retry-After": "5"})
    return {"status": "ok"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Return what is measured, for Prometheus."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/props", response_model=schemas.Props)
async def props(state: State) -> Any:
    """Describe what is served."""
    info = state.info
    return {
        "version": importlib.metadata.version("ziggurat"),
        "system_fingerprint": state.fingerprint,
        "models": list(state.models),
        "file": Path(info.path).name,
        "description": info.description,
        "n_params": info.n_params,
        "size": info.n_bytes,
        "n_vocab": info.n_vocab,
        "n_ctx": info.n_ctx,
        "n_ctx_train": info.n_ctx_train,
        "parallel": info.parallel,
        "kv_bytes": info.kv_bytes,
        "kv_unsupported": info.kv_unsupported,
        "generates_text": info.generates_text,
        "embedding_size": info.embedding_size,
        "chat_template": info.chat_template,
    }


@router.get("/slots", response_model=schemas.Slots)
async def slots(state: State) -> Any:
    """Tell what the engine does now."""
    stats = state.engine.stats()
    return {
        "running": stats.running,
        "queued": stats.queued,
        "queue_limit": stats.queue_limit,
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "kv": {
            "bytes": stats.kv_bytes,
            "bytes_allocated": stats.kv_bytes_allocated,
            "bytes_planned": stats.kv_bytes_planned,
            "bytes_held": sum(slot.kv_bytes for slot in stats.slots),
            "rows": sum(slot.rows for slot in stats.slots),
            "evicted_rows": stats.evicted_rows,
        },
        "slots": [
            {
                "id": index,
                "state": slot.state,
                "tokens": slot.tokens,
                "rows": slot.rows,
                "kv_bytes": slot.kv_bytes,
                "conversation": slot.conversation,
                "prompt_progress": slot.prompt_progress,
            }
            for index, slot in enumerate(stats.slots)
        ],
    }


@router.post("/tokenize", response_model=schemas.Tokens)
async def tokenize(body: schemas.TokenizeRequest, state: State) -> Response:
    """Return the tokens of a text."""
    engine = state.engine

    def work() -> list[Any]:
        tokens = engine.tokenize(body.content, add_special=body.add_special, parse_special=body.parse_special)
        if not body.with_pieces:
            return list(tokens)
        return [{"id": token, "piece": engine.detokenize([token])} for token in tokens]

    return JSONResponse({"tokens": await _in_thread(work, "content")})


@router.post("/detokenize", response_model=schemas.Text)
async def detokenize(body: schemas.DetokenizeRequest, state: State) -> Response:
    """Return the text of tokens."""
    work = functools.partial(state.engine.detokenize, body.tokens)
    return JSONResponse({"content": await _in_thread(work, "tokens")})


@router.get("/v1/kv/{conversation:path}", response_model=schemas.Kept)
async def kept(
    conversation: str,
    state: State,
    layers: Annotated[
        str | None, Query(pattern=r"^\d{1,4}(,\d{1,4})*$", description="Only these, such as 0,15,31.")
    ] = None,
    tokens: Annotated[bool, Query(description="Tell the tokens as well.")] = False,
) -> Response:
    """Tell which rows a conversation's last prompt and answer left: budgets and kept positions.

    A conversation is what requests have named so in ``conversation``, as long as no other has taken its place.
    """
    rows = await _in_thread(functools.partial(state.engine.kept, conversation), "conversation")
    wanted = None if layers is None else sorted(set(map(int, layers.split(","))))
    found = await _in_thread(functools.partial(_layers, rows, wanted), "layers")
    answer: dict[str, Any] = {
        "object": "kv",
        "conversation": conversation,
        "n_tokens": len(rows.tokens),
        "budgets": list(rows.budgets),
        "layers": found,
    }
    if tokens:
        answer["tokens"] = list(rows.tokens)
    return JSONResponse(answer)


def _layers(rows: KeptRows, wanted: list[int] | None) -> list[dict[str, Any]]:
    n_layer = len(rows.positions)
    if wanted and n_layer and wanted[-1] >= n_layer:
        raise InvalidRequestError(f"there is no layer {wanted[-1]}: the model has {n_layer}")
    found, n_runs = [], 0
    for layer in range(n_layer) if wanted is None or not n_layer else wanted:
        heads = [_runs(positions) for positions in rows.positions[layer]]
        n_runs += sum(map(len, heads))
        if n_runs > _MAX_RUNS:
            raise InvalidRequestError("this is too much for one answer: ask for some of the layers, layers=0,1")
        found.append({"layer": layer, "heads": heads})
    return found


def _runs(positions: Any) -> list[list[int]]:
    """Return ascending positions as runs of first position and length."""
    import numpy as np

    if not len(positions):
        return []
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(positions)])))
    runs: list[list[int]] = np.stack((np.asarray(positions)[starts], lengths), axis=1).tolist()
    return runs


async def _in_thread(work: Callable[[], Result], param: str) -> Result:
    """Run what takes a while, or waits for the engine, beside the event loop."""
    try:
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
    except InvalidRequestError as error:
        raise api_error(error, param) from error
