"""Puts the server together."""

from __future__ import annotations

import importlib.metadata

from fastapi import FastAPI

from ziggurat.runtime.engine import Engine
from ziggurat.runtime.server import (
    chat,
    completions,
    docs,
    embeddings,
    errors,
    kv_states,
    models,
    native,
    openapi,
    responses,
)
from ziggurat.runtime.server.metrics import Metrics
from ziggurat.runtime.server.middleware.auth import AuthMiddleware
from ziggurat.runtime.server.middleware.body import BodyMiddleware
from ziggurat.runtime.server.middleware.cors import cors
from ziggurat.runtime.server.middleware.limits import LimitsMiddleware
from ziggurat.runtime.server.middleware.log import LogMiddleware
from ziggurat.runtime.server.phase import Phase
from ziggurat.runtime.server.settings import ServerSettings
from ziggurat.runtime.server.state import ServerState


def create_app(engine: Engine, settings: ServerSettings | None = None, phase: Phase | None = None) -> FastAPI:
    """Return the ASGI application that serves an engine; its model is loaded if it is not yet.

    The engine stays the caller's to close. ``phase`` is that of the server that runs the application. Raises what
    ``Engine.load`` raises.
    """
    settings = settings or ServerSettings()
    app = FastAPI(
        title="Ziggurat",
        summary="An OpenAI-style API over a model in a GGUF file.",
        version=importlib.metadata.version("ziggurat"),
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=openapi.operation_id,
    )
    app.state.server = ServerState.of(engine, settings)
    errors.install(app)
    for room in (chat, completions, embeddings, models, native, kv_states, responses, docs):
        app.include_router(room.router)
    app.state.phase = phase = phase or Phase()
    app.state.metrics = metrics = Metrics(engine)
    _guard(app, settings, phase, metrics)
    return app


def _guard(app: FastAPI, settings: ServerSettings, phase: Phase, metrics: Metrics) -> None:
    """Put the middleware before an app: of these, the one that is added last sees a request first."""
    public = ["/health", *(["/metrics"] if settings.public_metrics else [])]
    openapi.install(app, keys=bool(settings.api_key), public=public)
    app.add_middleware(BodyMiddleware, limit=settings.max_body, timeout=settings.body_timeout)
    app.add_middleware(AuthMiddleware, keys=settings.api_key, public=public)
    app.add_middleware(LimitsMiddleware, phase=phase, requests=settings.max_requests, timeout=settings.request_timeout)
    app.add_middleware(cors, origins=settings.cors_origin)
    app.add_middleware(LogMiddleware, metrics=metrics)
