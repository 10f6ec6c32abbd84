"""What one connection may take: how many there are, how slowly they send a request's head and read an answer.

uvicorn's own HTTP protocol waits for both without end, and takes heads of any size. Errors in the protocol itself are
answered like all others.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ziggurat.runtime.server.errors import ApiError

_MAX_HEAD = 64 * 1024


@dataclass(frozen=True)
class ConnectionLimits:
    """``connections`` are open at a time at most; a further one is told so (503) and closed.

    Times in seconds. A request's head is there ``head_s`` after its first byte, on a new connection after its
    beginning. A client that reads nothing for ``stalled_s`` while there is something for it is cut off. A connection
    without a request is closed after ``idle_s``.
    """

    connections: int = 512
    head_s: float = 10.0
    stalled_s: float = 30.0
    idle_s: float = 30.0


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with limits; ``limited`` makes the class that uvicorn is given."""

    limits = ConnectionLimits()
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _in_head = False
    _n_head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or refuse."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(
                ApiError(
                    503,
                    f"{self.limits.connections} connections are open, as many as may",
                    code="too_many_connections",
                    headers={"Retry-After": "1"},
                )
            )
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        super().data_received(data)
        if self.transport.is_closing() or self._answering:
            return
        self._start_head_timer()
        if self._in_head:
            self._n_head += len(data)
            if self._n_head > _MAX_HEAD:
                message = f"the request's head is longer than {_MAX_HEAD} bytes"
                self._refuse(ApiError(431, message, code="head_too_large"))

    def on_message_begin(self) -> None:
        """A request's head begins."""
        super().on_message_begin()
        self._in_head, self._n_head = True, 0

    def on_headers_complete(self) -> None:
        """A request's head is there."""
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Go on to the next request, or see to it that the last bytes leave."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_stall_timer()
        elif self._in_head:
            self._start_head_timer()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to."""
        super().pause_writing()
        self._start_stall_timer()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_stall_timer()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that nothing was asked on."""
        super().timeout_keep_alive_handler()
        self._start_stall_timer()

    def shutdown(self) -> None:
        """Close the connection, after its answer."""
        super().shutdown()
        if self.transport.is_closing():
            self._start_stall_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._refuse(ApiError(400, "this is not a valid HTTP request", code="invalid_http"))

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ApiError) -> None:
        """Answer outside of any request, and close; in the middle of an answer there is nothing to be said."""
        if not self._answering:
            body = json.dumps(error.body()).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **error.headers,
            }
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + body)
        self._stop_head_timer()
        self.transport.close()
        self._start_stall_timer()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.head_s, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_stall_timer(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.stalled_s, self.transport.abort)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def limited(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """Return a protocol class with these limits."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})
