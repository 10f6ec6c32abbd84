"""How many tokens to draft: what acceptance and measured times promise most of.

Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", section 3. Deviations:
times are measured instead of assumed, and shared by all sequences of a step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


class Costs:
    """Seconds that a decoding step takes by the number of tokens in its batch, all sequences together.

    Averages of what was recorded: the longer ago a size was measured, the less its old value weighs. Sizes in between
    are interpolated; one beyond the largest goes on along the line from the smallest to the largest.
    """

    _MEMORY = 1 - 1 / 8
    _SLOPE = 0.1  # of a step, for each further token, while only one size was measured: cheap enough to try
    _FRESH = 64

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._seconds: dict[int, float] = {}
        self._recorded: dict[int, int] = {}
        self._count = 0
        self._draft: float | None = None

    def record(self, n_tokens: int, seconds: float) -> None:
        """Tell what a step with so many tokens took."""
        self._count += 1
        if n_tokens not in self._seconds:
            insort(self._sizes, n_tokens)
            self._seconds[n_tokens] = seconds
        else:
            keep = self._MEMORY ** (self._count - self._recorded[n_tokens])
            self._seconds[n_tokens] = keep * self._seconds[n_tokens] + (1 - keep) * seconds
        self._recorded[n_tokens] = self._count

    def record_draft(self, n_tokens: int, seconds: float) -> None:
        """Tell what a call of ``Drafter.draft`` took whose longest result has so many tokens."""
        each = seconds / max(1, n_tokens)
        self._draft = each if self._draft is None else self._MEMORY * self._draft + (1 - self._MEMORY) * each

    @property
    def draft(self) -> float:
        """Seconds that proposing takes for each token of the longest proposal."""
        return self._draft or 0.0

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


class Pace:
    """How well a sequence's drafts were accepted lately, and when it is time to try again.

    ``rate`` is the probability that a draft is accepted if those before it were: an exponentially weighted mean over
    the last 16 or so that were decided. A sequence for which drafting does not pay is tried again after 16 steps with
    ``PROBE`` tokens, then after twice as many each time, up to 256. So trying in vain costs at most ``PROBE`` more
    tokens in a batch, and what the drafter takes for them, in 16 steps at first and in 256 in the long run. A trial
    that is accepted as a whole makes the sequence's earlier failures forgotten.
    """

    PROBE = 2
    _PRIOR, _WEIGHT = 0.7, 2.0
    _MEMORY = 1 - 1 / 16
    _WAIT = (16, 256)

    def __init__(self) -> None:
        self._accepted, self._seen = self._PRIOR * self._WEIGHT, self._WEIGHT
        self._idle, self._wait = 0, self._WAIT[0]
        self._probing = False

    @property
    def rate(self) -> float:
        """The expected acceptance of a token, 0.0 to 1.0."""
        return self._accepted / self._seen

    def record(self, drafted: int, accepted: int) -> None:
        """Tell how many tokens were proposed in a step, none included, and how many of them the model chose."""
        if not drafted:
            self._idle += 1
            return
        decided = min(accepted + 1, drafted)
        whole = accepted == drafted
        if whole and self._probing:
            self._accepted, self._seen = self._PRIOR * self._WEIGHT + accepted, self._WEIGHT + accepted
        else:
            keep = self._MEMORY**decided
            self._accepted = keep * self._accepted + accepted
            self._seen = keep * self._seen + decided
        if self._probing:
            self._wait = min(2 * self._wait, self._WAIT[1])
        elif whole:
            self._wait = self._WAIT[0]
        self._idle = 0

    def probe(self, length: int, limit: int) -> int:
        """Return ``length``, or a trial's length if it is 0 and time for one."""
        self._probing = length == 0 and self._idle >= self._wait
        return min(self.PROBE, limit) if self._probing else length


def shares(paces: Sequence[Pace], limits: Sequence[int], costs: Costs, others: int = 0) -> list[int]:
    """Return how many tokens to draft for each sequence of a step, 0 to its limit.

    Chosen so that the tokens expected of the whole step per second are most: draft j of a sequence is accepted with
    probability ``rate ** j``, and for any total the likeliest drafts of all sequences are best. ``others`` sequences
    are in the batch without drafts. Drafting has to promise 2 % more than none. When no step without drafts was
    measured for 64 steps, this one is: else nobody would notice that such steps have become cheap.
    """
    base = others + len(paces)
    rates = [pace.rate for pace in paces]
    drafts = sorted(
        (-(rate**depth), depth, index)
        for index, (rate, limit) in enumerate(zip(rates, limits, strict=True))
        for depth in range(1, limit + 1)
    )
    expected, deepest, taken = float(base), 0, 0
    best = 1.02 * expected / costs.step(base)
    for count, (negative, depth, _) in enumerate(drafts if costs.fresh(base) else (), 1):
        expected -= negative
        deepest = max(deepest, depth)
        speed = expected / (costs.step(base + count) + costs.draft * deepest)
        if speed > best:
            best, taken = speed, count
    lengths = [0] * len(paces)
    for _, _, index in drafts[:taken]:
        lengths[index] += 1
    return [pace.probe(length, limit) for pace, length, limit in zip(paces, lengths, limits, strict=True)]
