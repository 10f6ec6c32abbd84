"""Runs the application: from the bound socket to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ziggurat.runtime.server.connections import ConnectionLimits, limited
from ziggurat.runtime.server.listen import Listen, bound
from ziggurat.runtime.server.phase import Phase

_logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# for cancelled requests to say goodbye, and for their last bytes to leave
_FAREWELL_S = 3.0
_INTERRUPTED = 130  # 128 + SIGINT, as our other commands end


def serve(
    app: ASGIApp,
    phase: Phase,
    listen: Listen | None = None,
    *,
    grace: float = 30.0,
    limits: ConnectionLimits | None = None,
    announce: Callable[[str], None] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code: 0, or 130 after SIGINT. ``announce`` gets the URL.

    With the first signal new requests are refused (503) and running ones have ``grace`` seconds; then they are
    cancelled, streams with an error event. The second signal ends the process at once, with 128 + its number.
    Raises ListenError.
    """
    listen, limits = listen or Listen(), limits or ConnectionLimits()
    listen.check_tls()
    with bound(listen) as sock:
        config = uvicorn.Config(
            app,
            http=limited(limits),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(limits.idle_s),
            timeout_graceful_shutdown=int(_FAREWELL_S),
            ssl_certfile=listen.tls_certificate,
            ssl_keyfile=listen.tls_key,
        )
        server = Server(config, phase, grace, listen)
        if announce is not None:
            announce(listen.url(sock))
        asyncio.run(server.serve(sockets=[sock]))
    return _INTERRUPTED if server.signal == signal.SIGINT else 0


class Server(uvicorn.Server):
    """uvicorn's server, that lets requests end before it closes anything."""

    def __init__(self, config: uvicorn.Config, phase: Phase, grace: float, listen: Listen | None = None) -> None:
        super().__init__(config)
        #: The first signal that came.
        self.signal: int | None = None
        self._phase, self._grace = phase, grace
        self._socket_file = listen.unix_socket if listen is not None else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals for the block; unlike uvicorn, do not raise them again after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.signal is not None:
            self._end_now(sig)
        self.signal = sig
        self.close()

    def close(self) -> None:
        """Begin to close; from any thread, and from a signal handler."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._draining is None:
            self._phase.state = "closing"
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        phase = self._phase
        if phase.running:
            _logger.info("closing: %d requests have %g s to end", phase.running, self._grace)
        await self._none_running(self._grace)
        ended = phase.end_all()
        if ended:
            _logger.warning("closing: %d requests were cancelled", ended)
            await self._none_running(_FAREWELL_S)
        self.should_exit = True

    async def _none_running(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._phase.running and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def _end_now(self, sig: int) -> None:
        if self._socket_file is not None:
            with contextlib.suppress(OSError):
                self._socket_file.unlink()
        os._exit(128 + sig)
