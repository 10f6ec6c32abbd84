"""The figures that readouts show, put together from an answer's events and what the server tells of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ziggurat.tui.backend import ChatEvent, Delta, Done, Progress, Status, Timings, Usage
from ziggurat.tui.meter import Meter


@dataclass(frozen=True)
class Figures:
    """What is known now; None and 0 stand for unknown. Rates in tokens per second, times in seconds, sizes in bytes.

    ``progress`` is the part of the prompt that was read, while it is. ``rate`` is of the running answer, or of the
    whole last one; ``history`` the rates of the last seconds. ``context_used`` are the tokens of the conversation as
    the model has seen it.
    """

    progress: float | None = None
    prompt_rate: float = 0.0
    rate: float = 0.0
    history: tuple[float, ...] = ()
    time_to_first_token_s: float | None = None
    tokens: int = 0
    context_used: int = 0
    usage: Usage | None = None
    timings: Timings | None = None
    status: Status | None = None

    @property
    def context_part(self) -> float | None:
        """Which part of the context is used, None where its size is unknown."""
        n_ctx = self.status.n_ctx if self.status is not None else None
        return self.context_used / n_ctx if n_ctx else None

    @property
    def kv_bytes(self) -> int:
        """What the KV cache takes."""
        return self.timings.kv_bytes if self.timings is not None else self.status.kv_bytes if self.status else 0

    @property
    def kv_bytes_full(self) -> int:
        """What keeping every row would take."""
        found = self.timings.kv_bytes_full if self.timings is not None else 0
        return found or (self.status.kv_bytes_full if self.status else 0)

    @property
    def accepted(self) -> float | None:
        """Which part of the drafted tokens the model accepted, None if none were."""
        timings = self.timings
        return timings.accepted_tokens / timings.drafted_tokens if timings and timings.drafted_tokens else None


class FiguresKeeper:
    """Collects figures of one session."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.status: Status | None = None
        self._clock, self._meter = clock, Meter(clock)
        self._sent = clock()
        self._progress: Progress | None = None
        self._first: float | None = None
        self._running = False
        self._usage: Usage | None = None
        self._timings: Timings | None = None
        self._tokens, self._rate = 0, 0.0
        self._untold = 0
        self._history: tuple[float, ...] = ()  # of the answer that has ended

    def start(self) -> None:
        """Begin with a request."""
        self._untold = 0
        self._sent, self._running = self._clock(), True
        self._progress, self._first, self._tokens, self._rate = None, None, 0, 0.0
        self._timings = None
        self._meter.start()

    def forget(self) -> None:
        """Begin with a conversation of which nothing is known."""
        self._usage = self._timings = self._progress = self._first = None
        self._history = ()
        self._tokens, self._running, self._rate, self._untold = 0, False, 0.0, 0
        self._meter.start()

    def take(self, event: ChatEvent) -> None:
        """Take what came."""
        if isinstance(event, Progress):
            self._progress = event
        elif isinstance(event, Delta):
            if self._first is None:
                self._first = self._clock() - self._sent
                self._meter.start()
            self._meter.count(event.tokens)
            self._tokens += event.tokens
        elif isinstance(event, Done):
            self.end()
            self._timings = event.timings
            if event.usage is not None:
                self._usage, self._untold = event.usage, 0
                self._tokens = event.usage.generated_tokens

    def end(self) -> None:
        """Take it that the request is over, however it ended."""
        if self._running:
            self._running = False
            self._rate, self._history = self._meter.mean(), self._meter.history()
            self._untold = self._tokens  # of a stopped answer nobody tells the usage

    def now(self) -> Figures:
        """Return what is known."""
        usage, timings, progress = self._usage, self._timings, self._progress
        answering = self._first is not None
        used = usage.prompt_tokens + usage.generated_tokens if usage is not None else 0
        # of a prompt that runs, or was answered in part, only what is known from the turn before
        used += self._tokens if self._running else self._untold
        rate = self._meter.rate() if self._running else timings.decode_tokens_per_second if timings else self._rate
        first = self._first
        if timings is not None and not self._running:
            first = timings.time_to_first_token_s
        return Figures(
            progress=progress.fraction if progress is not None and self._running and not answering else None,
            prompt_rate=_prompt_rate(progress, None if self._running else timings),
            rate=rate,
            history=self._meter.history() if self._running else self._history,
            time_to_first_token_s=first,
            tokens=self._tokens,
            context_used=used,
            usage=usage,
            timings=timings,
            status=self.status,
        )


def _prompt_rate(progress: Progress | None, timings: Timings | None) -> float:
    if timings is not None:
        return timings.prompt_tokens_per_second
    return progress.tokens_per_second if progress is not None else 0.0
