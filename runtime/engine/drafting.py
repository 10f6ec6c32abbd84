"""Which sequences get drafts, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ziggurat.runtime.engine.generation import Generation
from ziggurat.runtime.engine.speculation import Drafter, Speculation, Wanted


class Drafting:
    """Asks drafters on behalf of the sequences that decode; at most ``most`` tokens for each.

    A sequence is known from its first drafts until it is ``forgotten``. Used in the engine's thread.
    """

    def __init__(self, drafters: Sequence[Drafter], most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.speculation = Speculation(drafters, most, clock)
        self._known: set[Generation] = set()
        self._results: dict[int, tuple[int, int]] = {}

    def draft(self, generations: Sequence[Generation]) -> list[list[int]]:
        """Return the drafts after each sequence's pending token, often none."""
        self._results.clear()
        takers = [
            place
            for place, generation in enumerate(generations)
            if generation.job.request.speculate and generation.room > 1
        ]
        for place in takers:
            generation = generations[place]
            if generation not in self._known:
                self._known.add(generation)
                self.speculation.begin(generation.slot.index)
        wanted = [
            Wanted(generation.slot.index, generation.seen, generation.room - 1)
            for generation in map(generations.__getitem__, takers)
        ]
        drafts: list[list[int]] = [[] for _ in generations]
        if wanted:
            found = self.speculation.propose(wanted, len(generations) - len(takers))
            for place, draft in zip(takers, found, strict=True):
                drafts[place] = draft
        return drafts

    def judged(self, generation: Generation, drafted: int, accepted: int) -> None:
        """Learn how many tokens of a sequence's draft were right; it may have had none."""
        if generation in self._known:
            self._results[generation.slot.index] = drafted, accepted

    def computed(self, n_tokens: int, seconds: float) -> None:
        """Learn what the step took in which all that was judged since the last one happened."""
        self.speculation.record(self._results, n_tokens, seconds)

    def forget(self, generation: Generation) -> None:
        """A sequence has ended; what the drafters hold of it may serve the next one there."""
        self._known.discard(generation)

    def close(self) -> None:
        """Free what the drafters hold."""
        self.speculation.close()
