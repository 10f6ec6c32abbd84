"""How an evaluation tells what it does, and how it is stopped from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ziggurat.runtime.bindings import Context
from ziggurat.runtime.errors import EngineClosedError

#: Called with what is being done, how many steps are done, and how many there are.
Report = Callable[[str, int, int], None]


class Monitor:
    """Carries progress out of an evaluation and a stop into it. ``stop`` may be called from any thread."""

    def __init__(self, report: Report | None = None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._contexts: list[Context] = []
        self._stopped = False

    def watch(self, context: Context) -> None:
        """Let ``stop`` abort the batches of this context as well."""
        with self._lock:
            self._contexts.append(context)
            if self._stopped:
                context.abort.set()

    def report(self, what: str, done: int, total: int) -> None:
        """Report progress. Raises EngineClosedError when a stop was asked for."""
        if self._stopped:
            raise EngineClosedError("the evaluation was stopped")
        if self._report is not None:
            self._report(what, done, total)

    def loading(self, fraction: float) -> bool:
        """Take a model's load progress; returns whether to go on."""
        return not self._stopped

    def stop(self) -> None:
        """End what is running at its next step. Idempotent."""
        with self._lock:
            self._stopped = True
            for context in self._contexts:
                context.abort.set()
