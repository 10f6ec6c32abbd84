"""Conversations' rows in files of the server's own folder: kept on request, and taken up again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import APIRouter

from ziggurat.runtime.errors import StateFileError, StateMismatchError, ZigguratError
from ziggurat.runtime.files import state_file
from ziggurat.runtime.server.errors import ApiError, api_error
from ziggurat.runtime.server.schemas import native as schemas
from ziggurat.runtime.server.state import ServerState, State

router = APIRouter(tags=["Ziggurat"])


@router.post("/v1/kv/{conversation:path}/save", response_model=schemas.KeptState)
async def save(conversation: str, state: State) -> Any:
    """Write a conversation's rows to the server's folder, in place of those that were kept of it before."""
    path = _file(state, conversation)
    tokens = await _in_thread(functools.partial(state.engine.save, conversation, path))
    return {"object": "kv.state", "conversation": conversation, "n_tokens": tokens}


@router.post("/v1/kv/{conversation:path}/restore", response_model=schemas.KeptState)
async def restore(conversation: str, state: State) -> Any:
    """Take up rows that were kept, so that the conversation's next prompt goes on from there."""
    path = _file(state, conversation)
    if not path.exists():
        raise ApiError(404, "no rows of this conversation were kept", param="conversation", code="state_not_found")
    tokens = await _in_thread(functools.partial(state.engine.restore, conversation, path))
    return {"object": "kv.state", "conversation": conversation, "n_tokens": tokens}


def _file(state: ServerState, conversation: str) -> Path:
    folder = state.settings.kv_folder
    if folder is None:
        raise ApiError(404, "this server keeps no rows: start it with --kv-folder", code="no_kv_folder")
    return state_file(folder, conversation)


async def _in_thread(work: Callable[[], int]) -> int:
    """Run what takes a while beside the event loop."""
    try:
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
    except StateFileError as error:
        code = "state_mismatch" if isinstance(error, StateMismatchError) else "state_damaged"
        raise ApiError(409, str(error), param="conversation", code=code) from error
    except ZigguratError as error:
        raise api_error(error, "conversation") from error
