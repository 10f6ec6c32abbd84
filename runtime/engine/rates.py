"""How fast things went lately."""

from __future__ import annotations

import math


class Rate:
    """Tokens per second of the last seconds in which there was work; what is older fades over ``span`` of them."""

    def __init__(self, span: float = 5.0) -> None:
        self._span = span
        self._tokens = self._seconds = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Add a piece of work."""
        keep = math.exp(-seconds / self._span)
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds

    @property
    def per_second(self) -> float:
        """The rate; 0 before anything was recorded."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0


class Typical:
    """The usual length of something that is measured again and again: a moving median of few values, in seconds."""

    def __init__(self, count: int = 9) -> None:
        self._values: list[float] = []
        self._count = count
        self._next = 0

    def record(self, seconds: float) -> None:
        """Add a measurement; the oldest goes."""
        if len(self._values) < self._count:
            self._values.append(seconds)
        else:
            self._values[self._next] = seconds
            self._next = (self._next + 1) % self._count

    @property
    def seconds(self) -> float:
        """The median; 0 before the first."""
        return sorted(self._values)[len(self._values) // 2] if self._values else 0.0
