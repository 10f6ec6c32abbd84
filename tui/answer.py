"""An answer while it comes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ziggurat.tui.backend import BackendError, Delta, Done
from ziggurat.tui.conversation import Message


class RunningAnswer:
    """What came of an answer so far."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.ending: Literal["stop", "length", "cancelled"] = "stop"
        self.done: Done | None = None
        self.error: BackendError | None = None
        self._texts: list[str] = []
        self._thoughts: list[str] = []

    @property
    def came(self) -> bool:
        """Whether there is any text."""
        return bool(self._texts or self._thoughts)

    def take(self, delta: Delta) -> None:
        """Take new text."""
        (self._thoughts if delta.thought else self._texts).append(delta.text)

    def finished(self) -> Message:
        """Return the message as it ended."""
        done = self.done
        return replace(
            self.message,
            text="".join(self._texts),
            thought="".join(self._thoughts),
            ending="failed" if self.error is not None else self.ending,
            error=None if self.error is None else str(self.error),
            usage=None if done is None else done.usage,
            timings=None if done is None else done.timings,
        )
