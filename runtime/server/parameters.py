"""From what a client sent to requests for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ziggurat.runtime.engine import GenerationRequest
from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.sampling import SamplingParams
from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.schemas.common import GenerationFields, SamplingFields
from ziggurat.runtime.server.state import ServerState

_SEEDS = 2**32 - 1  # that the library knows; larger ones are taken modulo it
_NAMES = tuple(name for name in SamplingFields.model_fields if name not in ("seed", "logit_bias"))


def sampling_of(body: SamplingFields, **more: Any) -> SamplingParams:
    """Return the sampling settings of a request; ``more`` are further ones, such as a JSON schema.

    Raises ApiError naming the field.
    """
    given = {name: value for name in _NAMES if (value := getattr(body, name)) is not None}
    if body.seed is not None:
        given["seed"] = body.seed % _SEEDS
    if body.logit_bias:
        given["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    if "dry_sequence_breakers" in given:
        given["dry_sequence_breakers"] = tuple(given["dry_sequence_breakers"])
    if given.get("top_p") == 0:  # nothing but the likeliest token
        given["top_p"], given["top_k"] = 1.0, 1
    if "repeat_last_n" not in given and (body.presence_penalty or body.frequency_penalty):
        given["repeat_last_n"] = -1  # OpenAI's penalties look at the whole text
    given |= more
    try:
        return SamplingParams(**given)
    except InvalidRequestError as error:
        raise ApiError(400, str(error), param=_culprit(given), code="invalid_value") from None


def _culprit(given: dict[str, Any]) -> str | None:
    for name, value in given.items():
        try:
            SamplingParams(**{name: value})
        except InvalidRequestError:
            return name
    return None


def choices_of(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """Return ``n`` requests for the same text, which differ in their seeds if there is one."""
    if n == 1:
        return [request]
    sampling = request.sampling
    requests = []
    for number in range(n):
        seed = None if sampling.seed is None else (sampling.seed + number) % _SEEDS
        # only one of them can have the conversation's name
        name = request.conversation if number == 0 else None
        requests.append(request_with(request, sampling=replace(sampling, seed=seed), conversation=name))
    return requests


def request_with(request: GenerationRequest, **changes: Any) -> GenerationRequest:
    """Return the request with changes, and an id of its own."""
    fields = {name: getattr(request, name) for name in request.__dataclass_fields__ if name != "id"}
    return GenerationRequest(**(fields | changes))


def common_fields(state: ServerState, body: GenerationFields) -> dict[str, Any]:
    """Return the fields of the engine's request that come from what all bodies have. Raises ApiError."""
    unknown = [token for token in body.logit_bias or () if int(token) >= state.info.n_vocab]
    if unknown:
        message = f"logit_bias: token {unknown[0]} is not in the vocabulary (0 to {state.info.n_vocab - 1})"
        raise ApiError(400, message, param="logit_bias", code="invalid_value")
    return {
        "stop": body.stop_texts(),
        "conversation": body.conversation,
        "reread": bool(body.reread),
        "speculate": body.speculate is not False,
        "timeout_s": state.settings.request_timeout,
    }


def token_limit(state: ServerState, asked: int | None) -> int:
    """Return how many tokens may be generated: without a limit as many as the context has, so that it always ends."""
    return state.info.n_ctx if asked is None else asked


def agreed(values: Sequence[tuple[str, int | None]]) -> int | None:
    """Return the one value of fields that mean the same. Raises ApiError when they contradict each other."""
    given = [(name, value) for name, value in values if value is not None]
    if len({value for _, value in given}) > 1:
        told = " and ".join(f"{name} {value}" for name, value in given)
        raise ApiError(400, f"{told} contradict each other: give one of them", param=given[0][0], code="invalid_value")
    return given[0][1] if given else None
