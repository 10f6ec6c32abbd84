"""Server-sent events over ASGI: as little as possible per event, and an end as soon as nobody reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ziggurat.runtime.engine import Event
from ziggurat.runtime.server.errors import api_error
from ziggurat.runtime.server.generation import Generations

DONE = b"data: [DONE]\n\n"
_PING = b": still here\n\n"


def sse(data: Any) -> bytes:
    """Return an event whose data is JSON."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def event_parts(
    generations: Generations,
    encode: Callable[[int, Event], bytes],
    *,
    first: bytes = b"",
    last: Callable[[], bytes] = lambda: DONE,
) -> AsyncGenerator[bytes, None]:
    """Yield the parts of a stream: ``first``, what ``encode`` makes of each event by its place, and ``last``.

    What comes at the same time is one part: to hand a part to the connection takes longer than all else here.
    """
    with generations:
        if first:
            yield first
        async for batch in generations.batches():
            part = b"".join([encode(place, event) for place, event in batch])
            if part:
                yield part
        yield last()


class EventSourceResponse(Response):
    """Sends the parts of a stream, each one or more whole events, as they come.

    An exception that the parts raise is sent as an event with an error object, and ends the stream. When the client
    leaves, the generator is closed at once. While nothing comes a comment is sent every ``ping`` seconds, so that
    nothing between here and the client takes the connection for dead.

    This is not sse-starlette's: importing that changes uvicorn's way to shut down, and it would end streams at once.
    """

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncGenerator[bytes, None], *, ping: float = 15.0) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._parts, self._ping = parts, ping
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or until the client leaves."""
        tasks = [asyncio.ensure_future(work) for work in (self._write(send), _gone(receive), self._pings(send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._parts.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for part in self._parts:
                self._sent += 1
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except OSError:  # the connection is gone
            return
        except Exception as error:
            await send({"type": "http.response.body", "body": sse(api_error(error).body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pings(self, send: Send) -> None:
        while True:
            before = self._sent
            await asyncio.sleep(self._ping)
            if self._sent == before:
                await send({"type": "http.response.body", "body": _PING, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
