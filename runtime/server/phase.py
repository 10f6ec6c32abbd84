"""Where the server is in its life, and the requests that run: what shutting down and refusing requests need to know."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

State = Literal["loading", "ready", "closing"]


class Running:
    """A request that runs, in the task that makes it. ``why`` is what ended it from outside, if anything did."""

    def __init__(self) -> None:
        self.why: Literal["closing", "timeout"] | None = None
        task = asyncio.current_task()
        assert task is not None
        self._task = task

    def end(self, why: Literal["closing", "timeout"]) -> None:
        """Cancel it; the first reason counts."""
        if self.why is None:
            self.why = why
            self._task.cancel()

    def ended(self) -> bool:
        """Whether a cancellation that has arrived is ours; it is over then, and the task can go on."""
        if self.why is None:
            return False
        if hasattr(self._task, "uncancel"):  # from Python 3.11
            self._task.uncancel()
        return True


class Phase:
    """The state of a server, and its requests. For one event loop; the state can be read from anywhere."""

    def __init__(self, state: State = "ready") -> None:
        self.state: State = state
        #: The part of the weights that is loaded, 0.0 to 1.0.
        self.loaded = 0.0
        self._running: set[Running] = set()

    @property
    def running(self) -> int:
        """Requests that run now, those for health and metrics not counted."""
        return len(self._running)

    def load_progress(self, part: float) -> None:
        """Take how much of the weights is loaded; from any thread."""
        self.loaded = part

    @contextmanager
    def request(self) -> Iterator[Running]:
        """Count a request of the current task while the block runs."""
        running = Running()
        self._running.add(running)
        try:
            yield running
        finally:
            self._running.discard(running)

    def end_all(self) -> int:
        """Cancel the requests that still run, and return how many."""
        ended = list(self._running)
        for running in ended:
            running.end("closing")
        return len(ended)
