"""Measures: at every place the settings take turns, in one order and then in the other."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ziggurat.runtime import plan
from ziggurat.runtime.bench.axes import Axes, Place, Setting, Work
from ziggurat.runtime.bench.peak import peak_bytes, reset_peak
from ziggurat.runtime.bench.side import Allocated, Side, States
from ziggurat.runtime.bindings import Model
from ziggurat.runtime.evaluate.monitor import Monitor

PROMPT, GENERATION = "pp", "tg"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return those of some values; of a single one it is all three."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Result:
    """One test of one setting with so many threads: rates of all streams together, in tokens per second.

    ``ratio`` compares each turn with that of the first setting and threads, in the same round; None for these
    themselves. ``rows`` are those that each layer keeps of a prompt, None for all. ``peak_bytes`` is the process's at
    this place, with the contexts of everything that is compared there.
    """

    test: str
    n_tokens: int
    place: Place
    setting: Setting
    threads: int
    rates: tuple[float, ...]
    ratios: tuple[float, ...] | None
    rows: tuple[int, ...] | None
    allocated: Allocated
    filled: str
    peak_bytes: int = 0

    @property
    def name(self) -> str:
        """Its name as llama-bench writes it: tg128 @ d4096."""
        depth = f" @ d{self.place.depth}" if self.place.depth else ""
        return f"{self.test}{self.n_tokens}{depth}"

    @property
    def rate(self) -> Spread:
        """Tokens per second."""
        return Spread.of(self.rates)

    @property
    def ratio(self) -> Spread | None:
        """Times as fast as the first."""
        return None if self.ratios is None else Spread.of(self.ratios)


def run(model: Model, shape: plan.KVShape | None, axes: Axes, work: Work, monitor: Monitor) -> list[Result]:
    """Measure everything; raises what contexts raise, and EngineClosedError or DecodeAborted after ``monitor.stop``."""
    tests = [test for test, count in ((PROMPT, work.n_prompt), (GENERATION, work.n_gen)) if count]
    per_place = len(axes.settings) * (1 + work.repetitions * len(work.threads) * len(tests))
    steps = _Steps(monitor, per_place * len(axes.places))
    states: States = {}
    results = []
    for place in axes.places:
        reset_peak()
        with _sides(model, shape, axes.settings, place, work, states, monitor) as sides:
            for side in sides:
                steps.next()
                side.fill()
            found = [result for test in tests for result in _compare(test, sides, work, steps)]
        peak = peak_bytes()
        results += [replace(result, peak_bytes=peak) for result in found]
    return results


class _Steps:
    """Counts what is done, for the progress."""

    def __init__(self, monitor: Monitor, total: int) -> None:
        self._monitor, self._total, self._done = monitor, total, 0
        monitor.report("bench", 0, total)

    def next(self) -> None:
        """Report what was done before this."""
        self._monitor.report("bench", self._done, self._total)
        self._done += 1


@contextlib.contextmanager
def _sides(
    model: Model,
    shape: plan.KVShape | None,
    settings: Sequence[Setting],
    place: Place,
    work: Work,
    states: States,
    monitor: Monitor,
) -> Iterator[list[Side]]:
    with contextlib.ExitStack() as stack:
        sides = []
        for setting in settings:
            side = Side(model, shape, setting, place, work, states)
            stack.callback(side.close)
            monitor.watch(side.context)
            sides.append(side)
        yield sides


def _compare(test: str, sides: Sequence[Side], work: Work, steps: _Steps) -> list[Result]:
    """Let every side with every number of threads take its turns."""
    turns = [(side, threads) for side in sides for threads in work.threads]
    rates: list[list[float]] = [[] for _ in turns]
    count = work.n_prompt if test == PROMPT else work.n_gen
    for side in sides:
        side.reset()
    for round_ in range(work.repetitions):
        order = range(len(turns))
        for index in reversed(order) if round_ % 2 else order:
            side, threads = turns[index]
            steps.next()
            side.context.set_threads(threads)
            seconds = side.prompt() if test == PROMPT else side.generate(count)
            rates[index].append(count * side.place.streams / seconds)
    results = []
    for index, (side, threads) in enumerate(turns):
        kv = side.context.settings.kv
        ratios = tuple(rate / first for rate, first in zip(rates[index], rates[0], strict=True))
        results.append(
            Result(
                test=test,
                n_tokens=count,
                place=side.place,
                setting=side.setting,
                threads=threads,
                rates=tuple(rates[index]),
                ratios=ratios if index else None,
                rows=kv.rows if kv is not None else None,
                allocated=side.allocated(),
                filled=side.filled,
            )
        )
    return results
