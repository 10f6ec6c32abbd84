"""Streams of an engine as their consumers see them, and the library's functions as the engine's thread calls them."""

from __future__ import annotations

import ctypes
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.kv_models import tokens
from ziggurat.runtime.bindings import kv, library
from ziggurat.runtime.budget import Budget
from ziggurat.runtime.engine import Engine, Event, FinishEvent, GenerationRequest, TokenEvent
from ziggurat.runtime.kv_policy import KVPolicy
from ziggurat.runtime.sampling import SamplingParams

_WAIT = 600.0  # seconds that no step takes


def request(length: int, max_tokens: int, seed: int, **more: Any) -> GenerationRequest:
    """A prompt of random tokens, answered greedily and in any case with so many tokens."""
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    return GenerationRequest(tokens=tuple(tokens(length, seed)), max_tokens=max_tokens, sampling=sampling, **more)


def pyramid(rows: int | None) -> KVPolicy | None:
    """The default budget, of so many rows on average; None without."""
    return None if rows is None else KVPolicy(Budget(rows=rows))


class Listener:
    """Consumes one stream in a thread of its own, and notes when each token came there."""

    def __init__(self, engine: Engine, asked: GenerationRequest) -> None:
        self.times: list[float] = []
        self.done: FinishEvent | None = None
        self._error: BaseException | None = None
        self._came = threading.Condition()
        self.submitted = time.perf_counter()
        self._stream = engine.stream(asked)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        try:
            for event in self._stream:
                self._note(event)
        except Exception as error:
            self._error = error
            with self._came:
                self._came.notify_all()

    def _note(self, event: Event) -> None:
        now = time.perf_counter()
        with self._came:
            if isinstance(event, TokenEvent):
                self.times.append(now)
            else:
                self.done = event
            self._came.notify_all()

    def until(self, count: int) -> float:
        """Wait for so many tokens; return when the last of them came. Raises what ended the stream before."""
        with self._came:
            self._came.wait_for(lambda: len(self.times) >= count or self.done or self._error, _WAIT)
        if self._error is not None:
            raise self._error
        if len(self.times) < count:
            raise SystemExit(f"a stream ended after {len(self.times)} tokens of {count}: {self.done}")
        return self.times[count - 1]

    def cancel(self) -> None:
        self._stream.cancel()

    def end(self) -> FinishEvent:
        """Wait for the end. Raises what ended the stream."""
        self._thread.join(_WAIT)
        if self._error is not None:
            raise self._error
        if self.done is None:
            raise SystemExit("a stream does not end")
        return self.done

    @property
    def first(self) -> float:
        """Seconds from the request to its first token."""
        return self.times[0] - self.submitted

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between neighbouring tokens, the second of which came in this time."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False) if begin < b <= end]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p95, p99 and the largest, in seconds."""
    return {
        "median_s": statistics.median(values), "p95_s": percentile(values, 0.95), "p99_s": percentile(values, 0.99),
        "max_s": max(values), "count": len(values),
    }  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of the library: wall clock, what the calling thread computed, and the tokens of a decoded batch."""

    name: str
    thread: int
    begin: float
    end: float
    cpu: float
    thread_begin: float
    tokens: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass
class Calls:
    """The library's calls, in the order in which they ended."""

    made: list[Call] = field(default_factory=list)

    def between(self, begin: float, end: float) -> Iterator[Call]:
        """Those of the engine's thread, which is the one that decodes, that lie in this time."""
        decoding = {call.thread for call in self.made if call.name == "llama_decode"}
        return (call for call in self.made if call.thread in decoding and begin <= call.begin and call.end <= end)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        made, clock, cpu, thread = self.made, time.perf_counter, time.thread_time, threading.get_ident

        def call(*arguments: Any) -> Any:
            own, begin = cpu(), clock()
            try:
                return function(*arguments)
            finally:
                end = clock()
                n_tokens = arguments[1].n_tokens if name == "llama_decode" else 0
                made.append(Call(name, thread(), begin, end, cpu() - own, own, n_tokens))

        return call


@contextmanager
def library_calls() -> Iterator[Calls]:
    """Note every call of the library's functions while this is open; about a microsecond is added to each."""
    calls = Calls()
    api, budgets = library.api(), kv._functions() if kv.available() else {}
    native = {name: getattr(api, name) for name in _functions(api)}
    own = dict(budgets)
    for name, function in native.items():
        setattr(api, name, calls._timed(name, function))
    budgets.update({name: calls._timed(f"kv_{name}", function) for name, function in own.items()})
    try:
        yield calls
    finally:
        budgets.update(own)
        for name, function in native.items():
            setattr(api, name, function)


def _functions(api: Any) -> Iterable[str]:
    kinds = (ctypes._CFuncPtr, type(percentile))  # type: ignore[attr-defined]
    return [name for name in dir(api) if name.startswith("llama_") and isinstance(getattr(api, name), kinds)]
