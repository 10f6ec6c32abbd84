"""``POST /v1/responses``, without anything that is kept between requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ziggurat.runtime.engine import Event as EngineEvent
from ziggurat.runtime.engine import FinishEvent, GenerationRequest, GenerationStats
from ziggurat.runtime.server.answers import Answer
from ziggurat.runtime.server.errors import ApiError, api_error
from ziggurat.runtime.server.generation import Generations, attended
from ziggurat.runtime.server.parameters import sampling_of, token_limit
from ziggurat.runtime.server.record import record_of
from ziggurat.runtime.server.response_items import Event, OutputItems, messages_of, new_id
from ziggurat.runtime.server.results import chat_logprob
from ziggurat.runtime.server.schemas.responses import ResponseObject, ResponsesRequest
from ziggurat.runtime.server.state import ServerState, State
from ziggurat.runtime.server.streaming import EventSourceResponse
from ziggurat.runtime.server.tool_fields import bounds, response_schema, response_tools
from ziggurat.runtime.server.tools.use import ToolUse

router = APIRouter(tags=["OpenAI"])

_LOGPROBS = "message.output_text.logprobs"


@router.post("/v1/responses", response_model=ResponseObject)
async def responses(request: Request, body: ResponsesRequest, state: State) -> Response:
    """Answer once. Nothing is stored: each request holds the whole conversation."""
    model = state.model(body.model)
    record = record_of(request.scope)
    record.model = model
    asked, use = await asyncio.to_thread(_request, state, body)
    generations = Generations(state.engine, [asked], param="input", record=record)
    making = _Making(_head(body, asked, model), Answer(use.parser(eager=bool(body.stream))), generations)
    if not body.stream:
        text = json.dumps(await attended(request, _whole(making)), separators=(",", ":"))
        return Response(text, media_type="application/json")
    await generations.start()
    return EventSourceResponse(_parts(making), ping=state.settings.ping)


def _request(state: ServerState, body: ResponsesRequest) -> tuple[GenerationRequest, ToolUse]:
    """Return the engine's request, and how its answer is read."""
    if not state.info.has_chat_template:
        raise ApiError(400, "the model has no chat template: use /v1/completions", param="input")
    messages = messages_of(body)
    if not messages:
        raise ApiError(400, "the input has no messages", param="input", code="invalid_value")
    use = ToolUse.of(state.info.chat_template, response_tools(body))
    bound = bounds(state.engine, use, response_schema(body.text), grammar=body.grammar, param="text.format")
    wants_logprobs = body.top_logprobs is not None or _LOGPROBS in (body.include or ())
    request = GenerationRequest(
        messages=use.messages(messages),
        tools=use.definitions(),
        shown=use.shown(),
        max_tokens=token_limit(state, body.max_output_tokens),
        sampling=sampling_of(body, **bound),
        logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        timeout_s=state.settings.request_timeout,
    )
    return request, use


def _head(body: ResponsesRequest, asked: GenerationRequest, model: str) -> dict[str, Any]:
    """Return a response that has just begun."""
    given = body.model_dump(mode="json", by_alias=True, exclude_none=True, include={"text", "tools", "tool_choice"})
    tools = [{"description": None, "parameters": None, "strict": None, **tool} for tool in given.get("tools", ())]
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "temperature": asked.sampling.temperature,
        "text": {"format": {"type": "text"}, **given.get("text", {})},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": tools,
        "top_logprobs": body.top_logprobs,
        "top_p": asked.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
        "store": False,
        "background": False,
    }


class _Making:
    """A response while it is made."""

    def __init__(self, head: dict[str, Any], answer: Answer, generations: Generations) -> None:
        self.response, self.generations = head, generations
        self._answer, self._items = answer, OutputItems()

    def add(self, event: EngineEvent) -> list[Event]:
        """Take what the engine made, and return the events that tell of it."""
        deltas = self._answer.add(event)
        if isinstance(event, FinishEvent):
            return self._items.add(deltas) + self._finish(event)
        if self._answer.complete:
            self.generations.end(0)
        return self._items.add(deltas, () if event.logprobs is None else [chat_logprob(event.logprobs)])

    def _finish(self, event: FinishEvent) -> list[Event]:
        status = "incomplete" if event.reason == "length" else "completed"
        events = self._items.close(status)
        self.response |= {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items.items,
            "usage": _usage(event.stats),
        }
        return [*events, {"type": f"response.{status}", "response": self.response}]

    def fail(self, error: ApiError) -> Event:
        """End it with an error."""
        told = {"code": error.code or "server_error", "message": error.message}
        self.response |= {"status": "failed", "error": told, "output": self._items.items}
        return {"type": "response.failed", "response": self.response}


def _usage(stats: GenerationStats) -> dict[str, Any]:
    read, reused, generated = stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": reused, "cache_write_tokens": read - reused},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + generated,
    }


async def _whole(making: _Making) -> dict[str, Any]:
    with making.generations:
        async for _, event in making.generations.events():
            making.add(event)
    return making.response


async def _parts(making: _Making) -> AsyncGenerator[bytes, None]:
    number = 0

    def encoded(events: list[Event]) -> bytes:
        nonlocal number
        parts = []
        for event in events:
            data = json.dumps({**event, "sequence_number": number}, separators=(",", ":"))
            parts.append(f"event: {event['type']}\ndata: {data}\n\n")
            number += 1
        return "".join(parts).encode()

    with making.generations:
        yield encoded([{"type": f"response.{at}", "response": making.response} for at in ("created", "in_progress")])
        try:
            async for batch in making.generations.batches():
                part = b"".join([encoded(making.add(event)) for _, event in batch])
                if part:
                    yield part
        except Exception as error:
            yield encoded([making.fail(api_error(error))])
            raise  # and as the error event that every stream ends with
