"""Rates of a running answer: now, and over the last seconds for a sparkline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_BIN_S = 0.25
_BINS = 40
_WINDOW_BINS = 4
# a time too short to tell a rate of
_SHORT_S = 0.05


class Meter:
    """Counts tokens in bins of a quarter of a second. ``clock`` tells monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bins: deque[int] = deque([0], maxlen=_BINS)
        self._started = self._opened = clock()
        self.tokens = 0

    def start(self) -> None:
        """Begin with an answer: nothing is counted yet."""
        self._bins = deque([0], maxlen=_BINS)
        self._started = self._opened = self._clock()
        self.tokens = 0

    def count(self, tokens: int) -> None:
        """Take tokens that came now."""
        self._turn()
        self._bins[-1] += tokens
        self.tokens += tokens

    def rate(self) -> float:
        """Return tokens per second over the last second, or since the start if that is less."""
        self._turn()
        now = self._clock()
        counted = list(self._bins)[-_WINDOW_BINS:]
        seconds = min((len(counted) - 1) * _BIN_S + now - self._opened, now - self._started)
        return sum(counted) / seconds if seconds > _SHORT_S else 0.0

    def mean(self) -> float:
        """Return tokens per second since the start."""
        seconds = self._clock() - self._started
        return self.tokens / seconds if seconds > _SHORT_S else 0.0

    def history(self) -> tuple[float, ...]:
        """Return tokens per second of the last ten seconds by whole bins, oldest first."""
        self._turn()
        return tuple(count / _BIN_S for count in list(self._bins)[:-1])

    def _turn(self) -> None:
        """Open the bin that now is in."""
        passed = int((self._clock() - self._opened) / _BIN_S)
        self._opened += passed * _BIN_S
        self._bins.extend([0] * min(passed, _BINS))
