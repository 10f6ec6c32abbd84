"""How what went wrong is told: one error object, one encoder for every exception, the same in JSON and in a stream."""

from __future__ import annotations

import http
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ziggurat.runtime.errors import (
    ConversationError,
    EngineClosedError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    RequestTimeoutError,
    TemplateError,
    ZigguratError,
)

_logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is not a success, as OpenAI's API writes it.

    ``param`` names the field it is about, ``code`` is for programs; ``type`` follows from the status if not given.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def api_error(error: BaseException, param: str | None = None) -> ApiError:
    """Return how an exception is told; ``param`` is the field that the engine's complaints are about."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnicodeEncodeError):  # JSON can write what no text can hold
        return ApiError(400, "a text has half of a surrogate pair, which is no character", code="invalid_value")
    if not isinstance(error, ZigguratError):
        _logger.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed on this request; its log says why", code="internal_error")
    message = str(error).split("; use --raw")[0]  # advice for the command line
    if isinstance(error, PromptTooLongError):
        return ApiError(
            400,
            f"the prompt has {error.n_prompt} tokens and this model's context is {error.n_ctx}: shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )
    if isinstance(error, (InvalidRequestError, TemplateError)):
        return ApiError(400, message, param=param, code="invalid_value")
    if isinstance(error, QueueFullError):
        retry = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        return ApiError(429, message, code="queue_full", headers=retry)
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, message, code="request_timeout")
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the server is closing", code="server_closing", headers={"Retry-After": "5"})
    if isinstance(error, ConversationError):
        return ApiError(404, message, param="conversation", code="conversation_not_found")
    _logger.error("the engine failed on a request: %s", error)
    return ApiError(500, message, code="engine_error")


def install(app: FastAPI) -> None:
    """Have an app answer every exception with an error object."""

    async def ours(_request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    async def invalid(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error.errors(), error.body).response()

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _http_error(request, error).response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(ZigguratError, ours)
    app.add_exception_handler(UnicodeEncodeError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, ours)


def _http_error(request: Request, error: HTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"{where}: there is no such path here", code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{where}: this path takes {allowed or 'other methods'}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    detail = error.detail or http.HTTPStatus(error.status_code).phrase
    return ApiError(error.status_code, detail, headers=error.headers)


def _validation_error(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Return the first error of a request's body, with the path of its field.

    Of a union, each of whose types complains, the complaint that goes deepest is taken, and those beside it.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(
            400, f"the body is not valid JSON: {reason} at character {first['loc'][-1]}", code="invalid_json"
        )
    start = _path(first["loc"], body)
    found = [(path, error) for error in errors if (path := _path(error["loc"], body))[: len(start)] == start]
    deepest = max((path for path, _ in found), key=len)
    same = [error for path, error in found if path == deepest]
    message = " or ".join(dict.fromkeys(str(error["msg"]) for error in same))
    param = _written(deepest)
    kind = str(same[0]["type"])
    if kind == "missing":
        code = "missing_required_parameter"
    else:
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(400, f"{param or 'the body'}: {message}", param=param, code=code)


def _path(loc: Sequence[Any], body: Any) -> tuple[Any, ...]:
    """Return the place in the body that an error is about: pydantic's without the names of a union's types."""
    where, path, place = loc[0] if loc else "body", [], body
    if where != "body":
        return tuple(loc[1:])
    for number, step in enumerate(loc[1:], start=2):
        if isinstance(place, dict) and isinstance(step, str) and (step in place or number == len(loc)):
            place = place.get(step)
        elif isinstance(place, list) and isinstance(step, int) and step < len(place):
            place = place[step]
        else:
            continue
        path.append(step)
    return tuple(path)


def _written(path: Sequence[Any]) -> str | None:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or None
