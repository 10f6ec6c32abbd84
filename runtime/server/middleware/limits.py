"""How many requests run, for how long, and whether any are taken at all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ziggurat.runtime.server.errors import ApiError
from ziggurat.runtime.server.middleware.refuse import end_stream, refuse
from ziggurat.runtime.server.phase import Phase, Running

# for the last words to a client whose request was ended
_FAREWELL_S = 2.0
# when somebody who was refused may try again: a place becomes free soon, a server is started again later
_SOON_S, _LATER_S = 1, 5


class LimitsMiddleware:
    """Refuses requests with 503 while the server closes, and beyond ``requests`` at a time.

    One that runs longer than ``timeout`` seconds (None: as long as it takes), or still runs when a closing server has
    waited long enough, is cancelled: 504 or 503, and as an SSE event where a stream has begun. ``always`` are paths
    that are answered in any case and not counted: they are asked when something is wrong.
    """

    def __init__(
        self,
        app: ASGIApp,
        phase: Phase,
        requests: int,
        timeout: float | None = None,
        always: Iterable[str] = ("/health", "/metrics"),
    ) -> None:
        self._app, self._phase, self._limit, self._timeout = app, phase, requests, timeout
        self._always = frozenset(always)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in self._always:
            await self._app(scope, receive, send)
            return
        refusal = self._refusal()
        if refusal is not None:
            await refuse(scope, receive, send, refusal)
            return
        response = _Response(send)
        with self._phase.request() as running:
            try:
                await self._timed(running, scope, receive, response)
            except asyncio.CancelledError:
                if not running.ended():
                    raise
                if not response.ended:
                    with anyio.move_on_after(_FAREWELL_S):
                        await self._end(scope, receive, response, self._reason(running))

    async def _timed(self, running: Running, scope: Scope, receive: Receive, response: _Response) -> None:
        if self._timeout is None:
            await self._app(scope, receive, response.send)
            return
        timer = asyncio.get_running_loop().call_later(self._timeout, running.end, "timeout")
        try:
            await self._app(scope, receive, response.send)
        finally:
            timer.cancel()

    def _refusal(self) -> ApiError | None:
        phase = self._phase
        if phase.state == "closing":
            return _unavailable("the server is closing", "server_closing", _LATER_S)
        if phase.running >= self._limit:
            return _unavailable(f"{self._limit} requests run, as many as may", "too_many_requests", _SOON_S)
        return None

    def _reason(self, running: Running) -> ApiError:
        if running.why == "closing":
            return _unavailable("the server closed before the answer was complete", "server_closing", _LATER_S)
        return ApiError(504, f"the request did not end within {self._timeout:g} s", code="request_timeout")

    async def _end(self, scope: Scope, receive: Receive, response: _Response, error: ApiError) -> None:
        if not response.started:
            await refuse(scope, receive, response.send, error)
        elif response.events:
            await end_stream(scope, response.send, error)
        # else what was sent cannot be completed, and the server closes the connection


def _unavailable(message: str, code: str, after: int) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(after)})


class _Response:
    """Passes a response on and remembers how far it is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.ended = self.events = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self.events = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.ended = True
        await self._send(message)
