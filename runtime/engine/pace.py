"""How many tokens to draft: what acceptance and measured times promise most of.

Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", section 3. Deviations:
times are measured instead of assumed, and all sequences of a step share them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

_MEMORY = 1 - 1 / 8


class Costs:
    """Seconds that a decoding step takes by the number of tokens in its batch, all sequences together.

    Averages of what was recorded: the longer ago a size was measured, the less its old value weighs. Sizes in between
    are interpolated; one beyond the largest goes on along the line from the smallest to the largest. Steps need not
    become slower with every token: kernels for four rows at a time are common.

    ``allowance`` are the seconds that may be spent on trying what does not seem to pay: 2 % of what steps take, saved
    for no more than eight steps' time. Trials begin while it is above 0, so they cost 2 % and one trial at most.
    """

    _SLOPE = 0.1  # of a step, for each further token, while only one size was measured: cheap enough to try
    _FRESH = 64

    def __init__(self) -> None:
        self.allowance = 0.0
        self._sizes: list[int] = []
        self._seconds: dict[int, float] = {}
        self._recorded: dict[int, int] = {}
        self._count = 0

    def record(self, n_tokens: int, seconds: float) -> None:
        """Tell what a step with so many tokens took."""
        self._count += 1
        if n_tokens not in self._seconds:
            insort(self._sizes, n_tokens)
            self._seconds[n_tokens] = seconds
        else:
            keep = _MEMORY ** (self._count - self._recorded[n_tokens])
            self._seconds[n_tokens] = keep * self._seconds[n_tokens] + (1 - keep) * seconds
        self._recorded[n_tokens] = self._count
        self.allowance = min(self.allowance + 0.02 * seconds, 8 * seconds)

    def fresh(self, n_tokens: int) -> bool:
        """Whether this size was among the last 64 that were recorded."""
        return n_tokens in self._recorded and self._count - self._recorded[n_tokens] < self._FRESH

    def step(self, n_tokens: int) -> float:
        """Seconds expected of a step with so many tokens; 1.0 and more when nothing was measured."""
        sizes, seconds = self._sizes, self._seconds
        if not sizes:
            return 1.0 + self._SLOPE * (n_tokens - 1)
        at = bisect_left(sizes, n_tokens)
        if at == 0:
            return seconds[sizes[0]]
        low, high = (sizes[at - 1], sizes[at]) if at < len(sizes) else (sizes[0], sizes[-1])
        slope = self._SLOPE * seconds[low] if low == high else (seconds[high] - seconds[low]) / (high - low)
        if at == len(sizes):
            return seconds[high] + max(slope, 0.0) * (n_tokens - high)
        return seconds[low] + slope * (n_tokens - low)


class Price:
    """Seconds that a drafter takes for each token of the longest draft of a call; calls without drafts are paid too."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def record(self, n_tokens: int, seconds: float) -> None:
        """Tell what a call took whose longest draft has so many tokens."""
        self._seconds = _MEMORY * self._seconds + seconds
        self._tokens = _MEMORY * self._tokens + n_tokens

    @property
    def seconds(self) -> float:
        """Seconds for a token."""
        return self._seconds / max(self._tokens, 1.0)


class Pace:
    """How well a sequence's drafts were accepted lately, and when it is time to try again.

    ``rate`` is the probability that a draft is accepted if those before it were: an exponentially weighted mean over
    the last 16 or so that were decided. A sequence for which drafting does not pay is tried again after 16 steps with
    ``TRIAL`` tokens (of a batch of four then, with only one sequence), after twice as many each time, up to 256. A
    trial that is accepted as a whole makes earlier failures forgotten.
    """

    TRIAL = 3
    _PRIOR, _WEIGHT = 0.7, 2.0
    _KEEP = 1 - 1 / 16
    _WAIT = (16, 256)

    def __init__(self) -> None:
        self.trying = False
        self._accepted, self._seen = self._PRIOR * self._WEIGHT, self._WEIGHT
        self._idle, self._wait = 0, self._WAIT[0]

    @property
    def rate(self) -> float:
        """The expected acceptance of a token, 0.0 to 1.0."""
        return self._accepted / self._seen

    @property
    def due(self) -> bool:
        """Whether it is time to try again."""
        return self._idle >= self._wait

    def record(self, drafted: int, accepted: int) -> None:
        """Tell how many tokens were proposed in a step, none included, and how many of them the model chose."""
        if not drafted:
            self._idle += 1
            return
        decided = min(accepted + 1, drafted)
        whole = accepted == drafted
        if whole and self.trying:
            self._accepted, self._seen = self._PRIOR * self._WEIGHT + accepted, self._WEIGHT + accepted
        else:
            keep = self._KEEP**decided
            self._accepted = keep * self._accepted + accepted
            self._seen = keep * self._seen + decided
        if self.trying:
            self._wait = min(2 * self._wait, self._WAIT[1])
        elif whole:
            self._wait = self._WAIT[0]
        self._idle = 0


def shares(
    paces: Sequence[Pace], limits: Sequence[int], costs: Costs, *, price: float = 0.0, others: int = 0
) -> list[int]:
    """Return how many tokens to draft for each sequence of a step, 0 to its limit.

    Chosen so that the tokens expected of the whole step per second are most: draft j of a sequence is accepted with
    probability ``rate ** j``, and for any total the likeliest drafts of all sequences are best. ``price`` are the
    seconds that drafting takes for each token of the longest draft; ``others`` tokens are in the batch besides.
    Drafting has to promise 2 % more than none. When no step without drafts was measured for 64 steps, this one is: else
    nobody would notice that such steps have become cheap. Sequences that are tried again have ``trying`` set.
    """
    base = others + len(paces)
    drafts = sorted(
        (-(pace.rate**depth), depth, index)
        for index, (pace, limit) in enumerate(zip(paces, limits, strict=True))
        for depth in range(1, limit + 1)
    )
    expected, deepest, taken = float(base), 0, 0
    best = 1.02 * expected / costs.step(base)
    for count, (negative, depth, _) in enumerate(drafts if costs.fresh(base) else (), 1):
        expected -= negative
        deepest = max(deepest, depth)
        speed = expected / (costs.step(base + count) + price * deepest)
        if speed > best:
            best, taken = speed, count
    lengths = [0] * len(paces)
    for _, _, index in drafts[:taken]:
        lengths[index] += 1
    for index, (pace, limit) in enumerate(zip(paces, limits, strict=True)):
        pace.trying = lengths[index] == 0 and pace.due and costs.allowance > 0
        if pace.trying:
            lengths[index] = min(pace.TRIAL, limit)
    return lengths
