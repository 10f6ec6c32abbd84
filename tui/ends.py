"""Ends from outside: signals, and a terminal that was closed. Both are to keep what Ctrl+Q keeps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator

from textual.app import App

# not every platform has both
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_HANGUP = 128 + 1
# in which everything has to be kept; a process nobody sees must not stay
_LATEST_S = 20.0
# between two looks at the terminal: where no signal tells of its end, the app would never notice
_LOOK_S = 0.5


class Ends:
    """Calls ``leave`` with an exit code, 128 and the signal's number, when the app is to end."""

    def __init__(self, app: App[None], leave: Callable[[int], Awaitable[None]]) -> None:
        self._app, self._leave = app, leave
        self._begun = False
        self._undrawn = contextlib.ExitStack()

    def listen(self) -> None:
        """Take signals from now on, which only the main thread can, and not on every platform; watch the terminal."""
        self._app.set_interval(_LOOK_S, self.terminal_gone)
        for number in _SIGNALS:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                asyncio.get_running_loop().add_signal_handler(number, self._begin, 128 + number)

    def forget(self) -> None:
        """Take signals no more."""
        for number in _SIGNALS:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                asyncio.get_running_loop().remove_signal_handler(number)

    def terminal_gone(self) -> bool:
        """Whether there was a terminal which is no more; then the end has begun."""
        gone = not self._app.is_headless and not all(map(os.isatty, _terminals()))
        if gone:
            self._begin(_HANGUP)
        return gone

    def _begin(self, code: int) -> None:
        if self._begun:
            return
        self._begun = True
        end = threading.Timer(_LATEST_S, os._exit, (code,))
        end.daemon = True
        end.start()
        if code == _HANGUP and not self._app.is_headless:
            self._draw_nothing()
        self._app.run_worker(self._leave(code), exit_on_error=False)

    def _draw_nothing(self) -> None:
        """Keep the app from a terminal that is gone: it fails there, and would at last wait for it for ever."""
        self._undrawn.enter_context(self._app.batch_update())
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in _terminals():
            os.dup2(nothing, number)
        os.close(nothing)


def _terminals() -> Iterator[int]:
    for file in (sys.__stdin__, sys.__stdout__, sys.__stderr__):
        if file is not None:
            yield file.fileno()
