"""The OpenAPI document: what the framework derives from routes and models, and what only we know.

The framework does not know that validation ends with 400 and an error object, what the middleware refuses, who needs a
key, or that answers can be streams.
"""

from __future__ import annotations

import http
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ziggurat.runtime.server.schemas.common import ErrorBody

Json = dict[str, Any]

_DESCRIPTION = """\
An OpenAI-style API over a model in a GGUF file. Unknown fields of a request are ignored, wrong types and values are
refused with the field's name in `param`. Fields marked as extensions are our own.

Every answer carries `X-Request-Id`: the request's own if it is 1 to 128 letters, digits and `._:-`, or a new one. An
error in the middle of a stream comes as an event with the same error object that a refusal has as its body.
"""
_WHEN = {
    400: "The request cannot be done as it is: `param` says which field, `message` why.",
    401: "No API key, or none that the server knows.",
    404: "The server does not have what was asked for.",
    408: "The request's body did not arrive in time.",
    409: "What was kept is of another model or other settings, or damaged.",
    413: "The request's body is too long.",
    415: "The request's body is not JSON by its content type.",
    429: "As many requests wait as may.",
    500: "The server made a mistake.",
    503: "The model is being loaded, the server closes, or as many requests run as may.",
    504: "The request took longer than the server allows.",
}
_RETRY = {
    "Retry-After": {
        "description": "Seconds until it is worth trying again.",
        "schema": {"type": "integer", "minimum": 0},
    }
}
_CHALLENGE = {"WWW-Authenticate": {"description": "How to authenticate.", "schema": {"type": "string"}}}
_HEADERS = {401: _CHALLENGE, 429: _RETRY, 503: _RETRY}
#: Paths whose work is done by the engine's queue, and those whose answers can be streams.
_QUEUED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_STREAMS = "; with `stream` true as server-sent events, objects as OpenAI's streams have them and `[DONE]` at the end"
_EXAMPLES: dict[str, Json] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Name three rivers."}],
        "max_tokens": 64,
        "temperature": 0.7,
    },
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 32},
    "/v1/embeddings": {"input": ["first text", "second text"]},
    "/v1/responses": {"input": "Name three rivers.", "max_output_tokens": 64},
    "/tokenize": {"content": "hello", "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}


def install(app: FastAPI, *, keys: bool, public: list[str]) -> None:
    """Have an app tell the truth at ``/openapi.json``: whether there are ``keys``, and which paths need none."""

    def document() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, keys, public)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the framework's own way to replace it


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Yield path, method and operation."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def _document(app: FastAPI, keys: bool, public: list[str]) -> Json:
    document: Json = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=_DESCRIPTION, routes=app.routes
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    error = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(error.pop("$defs", {}))
    schemas["ErrorBody"] = error
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, method, operation in operations(document):
        free = not keys or path in public
        if not free:
            operation["security"] = [{"key": []}]
        _responses(operation, _statuses(path, method, operation, free))
        if path in _EXAMPLES and "requestBody" in operation:
            operation["requestBody"]["content"]["application/json"]["example"] = _EXAMPLES[path]
        if path in _QUEUED:
            # of an event stream there is no schema in this version of OpenAPI
            operation["responses"]["200"]["content"]["text/event-stream"] = {}
            operation["responses"]["200"]["description"] += _STREAMS
    return document


def _statuses(path: str, method: str, operation: Json, free: bool) -> list[int]:
    """Return the statuses of errors that an operation can end with."""
    found = {503}
    if path != "/health":
        found.add(500)
    if not free:
        found.add(401)
    if path not in ("/health", "/metrics"):
        found.add(504)
    if "422" in operation["responses"]:
        found.add(400)
    if method == "post":
        found |= {400, 408, 413, 415}
    if path in (*_QUEUED, "/v1/embeddings") or "{" in path:
        found.add(404)
    if path in _QUEUED:
        found.add(429)
    if path.startswith("/v1/kv/") and method == "post":
        found.add(409)
    return sorted(found)


def _responses(operation: Json, statuses: list[int]) -> None:
    responses: Json = operation["responses"]
    responses.pop("422", None)
    for status in statuses:
        response: Json = {
            "description": f"{http.HTTPStatus(status).phrase}. {_WHEN[status]}",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
        }
        if status in _HEADERS:
            response["headers"] = _HEADERS[status]
        responses[str(status)] = response


def operation_id(route: Any) -> str:
    """Return an operation's id for the framework: the name of its function."""
    name: str = route.name
    return name
