"""What is served before there is an application: while the model loads, every request is told so.

How much of the weights is loaded, 0.000 to 1.000, stands in the header ``X-Load-Progress``.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.middleware.refuse import refuse
from ziggurat.runtime.server.phase import Phase

_RETRY_AFTER_S = 5


class Front:
    """An ASGI application that stands for another one until that is made."""

    def __init__(self, phase: Phase) -> None:
        #: What the application could not be made for.
        self.failure: BaseException | None = None
        self._phase = phase
        self._app: ASGIApp | None = None

    def open(self, app: ASGIApp) -> None:
        """Let requests through to the application; from any thread."""
        self._app = app
        if self._phase.state == "loading":
            self._phase.state = "ready"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 503."""
        if self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = {"Retry-After": str(_RETRY_AFTER_S), "X-Load-Progress": f"{self._phase.loaded:.3f}"}
            error = ApiError(503, "the model is being loaded", code="model_loading", headers=headers)
            await refuse(scope, receive, send, error)
