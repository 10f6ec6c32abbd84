"""What one connection may take: how many there are, how slowly they send a request's head and read an answer.

uvicorn's own HTTP protocol waits for both without end. Errors in the protocol itself are answered like all others.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ziggurat.runtime.server.errors import ApiError


@dataclass(frozen=True)
class ConnectionLimits:
    """``connections`` are open at a time at most; a further one is told so (503) and closed.

    Times in seconds. Within ``head_s`` a request's head is there, from its first byte (of a new connection, from its
    beginning). A client that reads nothing for ``stalled_s`` while there is something for it is cut off. A connection
    without a request is closed after ``idle_s``.
    """

    connections: int = 512
    head_s: float = 10.0
    stalled_s: float = 30.0
    idle_s: float = 30.0


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 in pure Python, with limits; ``limited`` makes the class that uvicorn is given."""

    limits = ConnectionLimits()
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or refuse."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.write(_too_many(self.limits.connections))
            self._close()
            return
        self._head_timer = self.loop.call_later(self.limits.head_s, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """Go on to the next request, or see to it that the last bytes leave."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_stall_timer()
        else:
            self._watch_head()

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
        """Answer what is not HTTP, unless an answer is on its way already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = ApiError(400, "this is not a valid HTTP request", code="invalid_http")
            self.transport.write(_raw(error, "Bad Request"))
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._start_stall_timer()

    def _watch_head(self) -> None:
        """Run the timer while a part of a request's head is there, and not the rest."""
        if self.conn.their_state is not h11.IDLE or not self.conn.trailing_data[0]:
            self._stop_head_timer()
        elif self._head_timer is None:
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


def _too_many(limit: int) -> bytes:
    error = ApiError(503, f"{limit} connections are open, as many as may", code="too_many_connections")
    return _raw(error, "Service Unavailable", b"retry-after: 1\r\n")


def _raw(error: ApiError, phrase: str, headers: bytes = b"") -> bytes:
    body = json.dumps(error.body()).encode()
    head = (
        f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n"
    )
    return head.encode() + headers + b"\r\n" + body
