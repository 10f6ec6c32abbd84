"""Runs the server: from the bound socket over loading the model to the exit code."""

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
from ziggurat.runtime.server.front import Front
from ziggurat.runtime.server.listen import Listen, bound
from ziggurat.runtime.server.phase import Phase

_logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# for cancelled requests to say goodbye, and for their last bytes to leave
_FAREWELL_S = 3.0


def serve(
    make_app: Callable[[Phase, str], ASGIApp],
    listen: Listen | None = None,
    *,
    grace: float = 30.0,
    limits: ConnectionLimits | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code: 0, or 130 after SIGINT.

    The socket is bound first. ``make_app`` is called once, with the server's phase and its URL, in a thread of its own:
    it loads the model, and until it returns every request is told so (503). What it raises ends the server and is
    raised here.

    With the first signal new requests are refused (503) and running ones have ``grace`` seconds; then they are
    cancelled, streams with an error event. A second signal ends the process at once, with 128 + its number, and so does
    the first one while the model loads, with the usual code. Raises ListenError.
    """
    listen, limits = listen or Listen(), limits or ConnectionLimits()
    listen.check_tls()
    with bound(listen) as sock:
        phase = Phase("loading")
        front = Front(phase)
        config = uvicorn.Config(
            front,
            http=limited(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(limits.idle_s)),
            timeout_graceful_shutdown=round(_FAREWELL_S),
            ssl_certfile=listen.tls_certificate,
            ssl_keyfile=listen.tls_key,
        )
        server = Server(config, phase, grace, on_exit=listen.remove)
        loading = threading.Thread(
            target=_load, args=(lambda: make_app(phase, listen.url(sock)), front, server), daemon=True
        )
        loading.start()
        server.run(sockets=[sock])
    if front.failure is not None:
        raise front.failure
    return _exit_code(server.signal)


def _load(make: Callable[[], ASGIApp], front: Front, server: Server) -> None:
    try:
        front.open(make())
    except BaseException as error:
        front.failure = error
        server.close()


def _exit_code(number: int | None) -> int:
    """Return what the process ends with after a signal: SIGTERM is how servers are meant to be stopped."""
    return 128 + number if number == signal.SIGINT else 0


class Server(uvicorn.Server):
    """uvicorn's server, that lets requests end before it closes anything."""

    def __init__(
        self, config: uvicorn.Config, phase: Phase, grace: float, *, on_exit: Callable[[], None] | None = None
    ) -> None:
        super().__init__(config)
        #: The first signal that came.
        self.signal: int | None = None
        self._phase, self._grace = phase, grace
        self._on_exit = on_exit
        self._asked_to_close = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop."""
        self._loop = asyncio.get_running_loop()
        if self._asked_to_close.is_set():
            return
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
            self._end_now(128 + sig)
        if self._phase.state == "loading":  # nothing runs, and loading cannot be waited for
            self._end_now(_exit_code(sig))
        self.signal = sig
        self.close()

    def close(self) -> None:
        """Begin to close; from any thread, and from a signal handler."""
        self._asked_to_close.set()
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

    def _end_now(self, code: int) -> None:
        if self._on_exit is not None:
            self._on_exit()
        os._exit(code)
