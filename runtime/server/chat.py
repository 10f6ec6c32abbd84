"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ziggurat.runtime.engine import Event, FinishEvent, GenerationRequest, GenerationStats, Message
from ziggurat.runtime.server.answers import Answer
from ziggurat.runtime.server.chunks import ChatChunks
from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.generation import Generations, attended
from ziggurat.runtime.server.parameters import agreed, choices_of, common_fields, sampling_of, token_limit
from ziggurat.runtime.server.record import record_of
from ziggurat.runtime.server.results import chat_logprob, timings_of, usage_of
from ziggurat.runtime.server.schemas.chat import ChatCompletion, ChatMessage, ChatRequest
from ziggurat.runtime.server.state import ServerState, State
from ziggurat.runtime.server.streaming import EventSourceResponse, event_parts
from ziggurat.runtime.server.tool_fields import bounds, chat_tools, format_schema
from ziggurat.runtime.server.tools.deltas import TextDelta
from ziggurat.runtime.server.tools.use import ToolUse

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
    if body.tools or body.response_format:  # in a thread: to make grammars of schemas takes a while
        asked, use = await asyncio.to_thread(_request, state, body)
    else:
        asked, use = _request(state, body)
    generations = Generations(
        state.engine, choices_of(asked, n), at_once=state.info.parallel, param="messages", record=record
    )
    answers = [Answer(use.parser(eager=bool(body.stream))) for _ in range(n)]
    head: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    if not body.stream:
        return JSONResponse(await attended(request, _whole(generations, answers, head)))
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    await generations.start()
    chunks = ChatChunks(head, usage=with_usage, n=n, tools=bool(use.tools.offered))
    first = b"".join(map(chunks.role, range(n)))
    parts = event_parts(generations, _encoder(generations, answers, chunks), first=first, last=chunks.end)
    return EventSourceResponse(parts, ping=state.settings.ping)


def _request(state: ServerState, body: ChatRequest) -> tuple[GenerationRequest, ToolUse]:
    """Return the request for one choice, and how its answer is read."""
    if not state.info.has_chat_template:
        raise ApiError(400, "the model has no chat template: use /v1/completions", param="messages")
    limit = agreed((("max_completion_tokens", body.max_completion_tokens), ("max_tokens", body.max_tokens)))
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs", code="invalid_value")
    use = ToolUse.of(state.info.chat_template, chat_tools(body))
    schema = format_schema(body.response_format)
    bound = bounds(state.engine, use, schema, grammar=body.grammar, param="response_format")
    request = GenerationRequest(
        messages=use.messages(tuple(map(_message, body.messages))),
        tools=use.definitions(),
        shown=use.shown(),
        max_tokens=token_limit(state, limit),
        sampling=sampling_of(body, **bound),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **common_fields(state, body),
    )
    return request, use


def _message(message: ChatMessage) -> Message:
    more: dict[str, Any] = {}
    if message.name is not None:
        more["name"] = message.name
    if message.tool_call_id is not None:
        more["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        more["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return Message(_ROLES.get(message.role, message.role), message.text(), more)


async def _whole(generations: Generations, answers: list[Answer], head: dict[str, Any]) -> dict[str, Any]:
    logprobs: list[list[dict[str, Any]]] = [[] for _ in answers]
    choices: list[dict[str, Any]] = [{} for _ in answers]
    stats: dict[int, GenerationStats] = {}
    with generations:
        async for index, event in generations.events():
            answer = answers[index]
            answer.add(event)
            if isinstance(event, FinishEvent):
                stats[index] = event.stats
                choices[index] = {
                    "index": index,
                    "message": _said(answer),
                    "logprobs": {"content": logprobs[index], "refusal": None} if logprobs[index] else None,
                    "finish_reason": answer.reason(event),
                }
                continue
            if event.logprobs is not None:
                logprobs[index].append(chat_logprob(event.logprobs))
            if answer.complete:
                generations.end(index)
    if len(answers) == 1:
        head["timings"] = timings_of(stats[0])
    else:
        for index, choice in enumerate(choices):
            choice["timings"] = timings_of(stats[index])
    return head | {"choices": choices, "usage": usage_of(stats, len(answers))}


def _said(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message


def _encoder(generations: Generations, answers: list[Answer], chunks: ChatChunks) -> Callable[[int, Event], bytes]:
    """Return what makes chunks of events."""

    def encode(index: int, event: Event) -> bytes:
        answer = answers[index]
        deltas = answer.add(event)
        if isinstance(event, FinishEvent):
            rest = b"".join(chunks.of(index, delta) for delta in deltas)
            return rest + chunks.finish(index, answer.reason(event), event.stats)
        if answer.complete:
            generations.end(index)
        if event.logprobs is None:
            return b"".join(chunks.of(index, delta) for delta in deltas)
        first, *others = deltas or [TextDelta("")]
        told = chunks.of(index, first, [chat_logprob(event.logprobs)])
        return told + b"".join(chunks.of(index, delta) for delta in others)

    return encode
