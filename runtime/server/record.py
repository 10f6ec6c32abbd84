"""What is known about one HTTP request, for its log line and the metrics.

The outermost middleware makes the record and puts it into the ASGI scope; handlers fill in what only they know, most of
it by handing the engine's events to a ``Meter``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ziggurat.runtime.engine import Event, FinishEvent

_KEY = "ziggurat.record"


class Observer(Protocol):
    """Who wants to know when tokens come: the metrics."""

    def first_token(self, seconds: float) -> None:
        """The first token of an answer came so many seconds after its request."""
        ...

    def gap(self, seconds: float) -> None:
        """A token of an answer came so many seconds after the one before it."""
        ...


@dataclass
class RequestRecord:
    """One HTTP request. Token counts are sums over its choices and prompts, as the engine computed them.

    ``started`` is of ``time.perf_counter``. ``route`` is the pattern of the path, None where nothing matched; ``error``
    the code or type of the error that was answered. ``finish`` are the reasons of the choices, in the order in which
    they ended.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    method: str = ""
    path: str = ""
    client: str | None = None
    started: float = field(default_factory=time.perf_counter)
    observer: Observer | None = None
    route: str | None = None
    status: int | None = None
    error: str | None = None
    disconnected: bool = False
    model: str | None = None
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    queue_s: float | None = None
    finish: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time since the request began."""
        return time.perf_counter() - self.started

    def meter(self) -> Meter:
        """Return what every event of one choice is to be handed to."""
        return Meter(self)


class Meter:
    """Counts one choice. Call it with every event of the engine as it arrives."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._last: float | None = None

    def __call__(self, event: Event) -> None:
        """Count an event."""
        record = self._record
        if isinstance(event, FinishEvent):
            record.finish.append(event.reason)
            record.prompt_tokens += event.stats.prompt_tokens
            record.reused_tokens += event.stats.reused_tokens
            record.queue_s = max(record.queue_s or 0.0, event.stats.queue_seconds)
            return
        now = time.perf_counter()
        record.completion_tokens += 1
        if self._last is None:
            if record.first_token_s is None:
                record.first_token_s = now - record.started
            if record.observer is not None:
                record.observer.first_token(now - record.started)
        elif record.observer is not None:
            record.observer.gap(now - self._last)
        self._last = now


def attach(scope: MutableMapping[str, Any], record: RequestRecord) -> None:
    """Put a record into an ASGI scope."""
    scope[_KEY] = record


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """Return the record of a request; one that nobody reads where no middleware made one."""
    record = scope.get(_KEY)
    if not isinstance(record, RequestRecord):
        record = RequestRecord()
        attach(scope, record)
    return record
