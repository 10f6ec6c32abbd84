"""What all handlers share."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from ziggurat.runtime.engine import Engine, ModelInfo
from ziggurat.runtime.errors import ModelFileError
from ziggurat.runtime.model_hash import model_hash
from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.settings import ServerSettings


@dataclass(frozen=True)
class ServerState:
    """A loaded engine and what was computed about it once.

    ``models`` are the names the model is listed under, the first of them is told in answers; ``fingerprint`` changes
    with the model's file and the library.
    """

    engine: Engine
    info: ModelInfo
    settings: ServerSettings
    models: tuple[str, ...]
    fingerprint: str
    created: int

    @classmethod
    def of(cls, engine: Engine, settings: ServerSettings) -> ServerState:
        """Return the state of a server; loads the model if it is not yet. Raises ZigguratError."""
        info = engine.load()
        names = tuple(settings.alias) or (Path(info.path).stem,)
        return cls(engine, info, settings, names, _fingerprint(info), int(time.time()))

    def model(self, name: str | None) -> str:
        """Return the name that an answer tells for the one that was asked for; refuses others with 404."""
        if name is None:
            return self.models[0]
        file = Path(self.info.path)
        if name in self.models:
            return name
        if name in (file.stem, file.name):
            return self.models[0]
        raise ApiError(
            404,
            f"the model {name!r} does not exist; this server has {', '.join(self.models)}",
            param="model",
            code="model_not_found",
        )


def _fingerprint(info: ModelInfo) -> str:
    try:
        model = model_hash(info.path)
    except ModelFileError:  # the file was removed after it was loaded
        model = info.description
    versions = []
    for distribution in ("ziggurat", "llama-cpp-python"):
        try:
            versions.append(importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            versions.append("")
    return "fp_" + hashlib.sha256("\n".join((model, *versions)).encode()).hexdigest()[:12]


async def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


#: The parameter of a handler that wants it.
State = Annotated[ServerState, Depends(_state)]
