"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ziggurat.runtime.engine import Event, FinishEvent, GenerationRequest, TokenEvent
from ziggurat.runtime.sampling import SamplingParams
from ziggurat.runtime.server.chunks import CompletionChunks
from ziggurat.runtime.server.errors import ApiError, api_error
from ziggurat.runtime.server.generation import Generations, attended
from ziggurat.runtime.server.parameters import choices_of, common_fields, sampling_of
from ziggurat.runtime.server.record import record_of
from ziggurat.runtime.server.results import completion_logprobs, timings_of, usage_of
from ziggurat.runtime.server.schemas.completions import MAX_PROMPTS, Completion, CompletionRequest
from ziggurat.runtime.server.state import ServerState, State
from ziggurat.runtime.server.streaming import EventSourceResponse, event_parts

router = APIRouter(tags=["OpenAI"])

#: What OpenAI's API generates when it is not told.
_MAX_TOKENS = 16


@router.post("/v1/completions", response_model=Completion)
async def completions(request: Request, body: CompletionRequest, state: State) -> Response:
    """Continue texts, without a chat template."""
    model = state.model(body.model)
    record = record_of(request.scope)
    record.model = model
    _check(body)
    n, candidates = body.n or 1, body.best_of or body.n or 1
    # in a thread: to read a grammar takes a while
    sampling = await asyncio.to_thread(sampling_of, body) if body.grammar else sampling_of(body)
    prompts = (_request(state, body, prompt, sampling) for prompt in body.prompts())
    requests = [one for prompt in prompts for one in choices_of(prompt, candidates)]
    generations = Generations(state.engine, requests, at_once=state.info.parallel, param="prompt", record=record)
    head: dict[str, Any] = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    answers = [_Answer(echo) for echo in await _echoes(state, body) for _ in range(candidates)]
    if not body.stream:
        return JSONResponse(await attended(request, _whole(generations, answers, head, body)))
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    await generations.start()
    chunks = CompletionChunks(head, usage=with_usage, n=n, n_choices=len(requests))
    echo = _echo(answers, chunks)
    parts = event_parts(generations, _encoder(answers, chunks, body.logprobs), first=echo, last=chunks.end)
    return EventSourceResponse(parts, ping=state.settings.ping)


@dataclass
class _Answer:
    """A text as far as it was made."""

    echo: str
    pieces: list[str] = field(default_factory=list)
    tokens: list[tuple[TokenEvent, int]] = field(default_factory=list)  # and where their text begins
    length: int = field(init=False)  # in characters
    end: FinishEvent | None = None

    def __post_init__(self) -> None:
        self.length = len(self.echo)

    def add(self, event: Event) -> None:
        if isinstance(event, FinishEvent):
            self.end = event
        elif event.logprobs is not None:
            self.tokens.append((event, self.length))
        self.pieces.append(event.text)
        self.length += len(event.text)

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens."""
        scores = [event.logprobs.chosen.logprob for event, _ in self.tokens if event.logprobs is not None]
        return sum(scores) / len(scores) if scores else 0.0


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise ApiError(400, "suffix is not supported: the text goes on where the prompt ends", param="suffix")
    count = len(body.prompts()) * (body.best_of or body.n or 1)
    if count > MAX_PROMPTS:
        message = f"prompts and choices make {count} texts; at most {MAX_PROMPTS} are generated at a time"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    if body.echo and body.logprobs is not None:
        message = "logprobs of a prompt are not supported: give echo or logprobs, not both"
        raise ApiError(400, message, param="echo", code="invalid_value")
    if body.stream and (body.best_of or 1) > (body.n or 1):
        message = "best_of above n cannot be streamed: which are best is known at the end"
        raise ApiError(400, message, param="best_of", code="invalid_value")


def _request(
    state: ServerState, body: CompletionRequest, prompt: str | list[int], sampling: SamplingParams
) -> GenerationRequest:
    logprobs = body.logprobs
    if logprobs is None and (body.best_of or 1) > (body.n or 1):
        logprobs = 0  # they tell which are best
    return GenerationRequest(
        prompt=prompt if isinstance(prompt, str) else None,
        tokens=None if isinstance(prompt, str) else tuple(prompt),
        max_tokens=_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        sampling=sampling,
        logprobs=logprobs,
        **common_fields(state, body),
    )


async def _echoes(state: ServerState, body: CompletionRequest) -> list[str]:
    """Return what the text of each prompt begins with."""
    if not body.echo:
        return [""] * len(body.prompts())
    try:
        return [
            prompt if isinstance(prompt, str) else await asyncio.to_thread(state.engine.detokenize, prompt)
            for prompt in body.prompts()
        ]
    except Exception as error:
        raise api_error(error, "prompt") from error


async def _whole(
    generations: Generations, answers: list[_Answer], head: dict[str, Any], body: CompletionRequest
) -> dict[str, Any]:
    with generations:
        async for place, event in generations.events():
            answers[place].add(event)
    n, candidates = body.n or 1, body.best_of or body.n or 1
    stats = {place: answer.end.stats for place, answer in enumerate(answers) if answer.end is not None}
    choices: list[dict[str, Any]] = []
    for first in range(0, len(answers), candidates):
        best = answers[first : first + candidates]
        if candidates > n:
            best = sorted(best, key=lambda answer: answer.likelihood, reverse=True)[:n]
        choices += (_choice(answer, body) for answer in best)
    for index, choice in enumerate(choices):
        choice["index"] = index
    if len(choices) == 1:
        head["timings"] = choices[0].pop("timings")
    return head | {"choices": choices, "usage": usage_of(stats, candidates)}


def _choice(answer: _Answer, body: CompletionRequest) -> dict[str, Any]:
    assert answer.end is not None
    return {
        "index": 0,
        "text": answer.echo + "".join(answer.pieces),
        "logprobs": None if body.logprobs is None else completion_logprobs(answer.tokens, body.logprobs),
        "finish_reason": answer.end.reason,
        "timings": timings_of(answer.end.stats),
    }


def _encoder(answers: list[_Answer], chunks: CompletionChunks, n_top: int | None) -> Callable[[int, Event], bytes]:
    """Return what makes chunks of events; ``n_top`` as ``logprobs`` of the request."""

    def encode(place: int, event: Event) -> bytes:
        if isinstance(event, FinishEvent):
            return chunks.finish(place, event)
        if event.logprobs is not None and n_top is not None:
            answer = answers[place]
            offset = answer.length
            answer.length += len(event.text)
            return chunks.with_logprobs(place, event.text, completion_logprobs([(event, offset)], n_top))
        return chunks.text(place, event.text) if event.text else b""

    return encode


def _echo(answers: list[_Answer], chunks: CompletionChunks) -> bytes:
    return b"".join(chunks.text(place, answer.echo) for place, answer in enumerate(answers) if answer.echo)
