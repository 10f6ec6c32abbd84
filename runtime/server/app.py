"""Puts the server together."""

from __future__ import annotations

import importlib.metadata

from fastapi import FastAPI

from ziggurat.runtime.engine import Engine
from ziggurat.runtime.server import chat, completions, errors, models
from ziggurat.runtime.server.settings import ServerSettings
from ziggurat.runtime.server.state import ServerState


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """Return the ASGI application that serves an engine; its model is loaded if it is not yet.

    The engine stays the caller's to close. Raises what ``Engine.load`` raises.
    """
    settings = settings or ServerSettings()
    app = FastAPI(
        title="Ziggurat",
        summary="An OpenAI-style API over a model in a GGUF file.",
        version=importlib.metadata.version("ziggurat"),
        redirect_slashes=False,
    )
    app.state.server = ServerState.of(engine, settings)
    errors.install(app)
    for room in (chat, completions, models):
        app.include_router(room.router)
    return app
