"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ziggurat.runtime.engine import Event, FinishEvent, GenerationRequest, GenerationStats, Message
from ziggurat.runtime.server.chunks import ChatChunks
from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.generation import Generations, attended
from ziggurat.runtime.server.parameters import agreed, choices_of, common_fields, sampling_of, token_limit
from ziggurat.runtime.server.record import record_of
from ziggurat.runtime.server.results import chat_logprob, timings_of, usage_of
from ziggurat.runtime.server.schemas.chat import ChatCompletion, ChatMessage, ChatRequest
from ziggurat.runtime.server.state import ServerState, State
from ziggurat.runtime.server.streaming import EventSourceResponse, event_parts

router = APIRouter(tags=["OpenAI"])

# templates know the older name only
_ROLES = {"developer": "system"}


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat_completions(request: Request, body: ChatRequest, state: State) -> Response:
    """Continue a conversation."""
    model = state.model(body.model)
    record = record_of(request.scope)
    record.model = model
    n = body.n or 1
    generations = Generations(
        state.engine, choices_of(_request(state, body), n), at_once=state.info.parallel, param="messages", record=record
    )
    head: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    if not body.stream:
        return JSONResponse(await attended(request, _whole(generations, head, n)))
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    await generations.start()
    chunks = ChatChunks(head, usage=with_usage, n=n)
    first = b"".join(map(chunks.role, range(n)))
    parts = event_parts(generations, _encoder(chunks), first=first, last=chunks.end)
    return EventSourceResponse(parts, ping=state.settings.ping)


def _request(state: ServerState, body: ChatRequest) -> GenerationRequest:
    """Return the request for one choice."""
    if not state.info.has_chat_template:
        raise ApiError(400, "the model has no chat template: use /v1/completions", param="messages")
    limit = agreed((("max_completion_tokens", body.max_completion_tokens), ("max_tokens", body.max_tokens)))
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs", code="invalid_value")
    return GenerationRequest(
        messages=tuple(map(_message, body.messages)),
        max_tokens=token_limit(state, limit),
        sampling=sampling_of(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **common_fields(state, body),
    )


def _message(message: ChatMessage) -> Message:
    more: dict[str, Any] = {}
    if message.name is not None:
        more["name"] = message.name
    if message.tool_call_id is not None:
        more["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        more["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return Message(_ROLES.get(message.role, message.role), message.text(), more)


async def _whole(generations: Generations, head: dict[str, Any], n: int) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in range(n)]
    logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    choices: list[dict[str, Any]] = [{} for _ in range(n)]
    stats: dict[int, GenerationStats] = {}
    with generations:
        async for index, event in generations.events():
            texts[index].append(event.text)
            if isinstance(event, FinishEvent):
                stats[index] = event.stats
                choices[index] = {
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(texts[index]), "refusal": None},
                    "logprobs": {"content": logprobs[index], "refusal": None} if logprobs[index] else None,
                    "finish_reason": event.reason,
                }
            elif event.logprobs is not None:
                logprobs[index].append(chat_logprob(event.logprobs))
    if n == 1:
        head["timings"] = timings_of(stats[0])
    else:
        for index in range(n):
            choices[index]["timings"] = timings_of(stats[index])
    return head | {"choices": choices, "usage": usage_of(stats, n)}


def _encoder(chunks: ChatChunks) -> Callable[[int, Event], bytes]:
    """Return what makes chunks of events."""

    def encode(index: int, event: Event) -> bytes:
        if isinstance(event, FinishEvent):
            rest = chunks.text(index, event.text) if event.text else b""
            return rest + chunks.finish(index, event.reason, event.stats)
        if event.logprobs is not None:
            return chunks.delta(index, {"content": event.text}, [chat_logprob(event.logprobs)])
        return chunks.text(index, event.text) if event.text else b""

    return encode
