"""Which sequences get drafts, how long, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ziggurat.runtime.engine.generation import Generation
from ziggurat.runtime.engine.pace import Costs, Pace, shares
from ziggurat.runtime.engine.speculation import Drafter, Reader, Wanted


class Drafting:
    """Asks a drafter on behalf of the sequences that decode; at most ``most`` tokens for each.

    A sequence is known from its first drafts until it is ``forgotten``. Used in the engine's thread.
    """

    def __init__(self, drafter: Drafter, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._drafter, self._most, self._clock = drafter, most, clock
        self._costs = Costs()
        self._paces: dict[Generation, Pace] = {}
        self._readers: dict[Generation, Reader] = {}

    def draft(self, generations: Sequence[Generation]) -> list[list[int]]:
        """Return the drafts after each sequence's pending token, often none."""
        takers = [place for place, generation in enumerate(generations) if self._takes(generation)]
        paces = [self._paces[generations[place]] for place in takers]
        limits = [max(0, min(self._most, generations[place].room - 1)) for place in takers]
        lengths = shares(paces, limits, self._costs, len(generations) - len(takers))
        drafts: list[list[int]] = [[] for _ in generations]
        asked = [(place, length) for place, length in zip(takers, lengths, strict=True) if length]
        if asked:
            begun = self._clock()
            wanted = [Wanted(generations[place].slot.index, generations[place].seen, length) for place, length in asked]
            found = self._drafter.draft(wanted)
            self._costs.record_draft(max(map(len, found)), self._clock() - begun)
            for (place, _), draft in zip(asked, found, strict=True):
                drafts[place] = draft
        return drafts

    def _takes(self, generation: Generation) -> bool:
        """Whether a sequence wants drafts, and the drafter has read its prompt."""
        if not generation.job.request.speculate:
            return False
        if generation not in self._paces:
            self._paces[generation] = Pace()
            reader = self._drafter.reader(generation.slot.index, generation.seen)
            if reader is not None:
                self._readers[generation] = reader
        return generation not in self._readers

    def prepare(self) -> bool:
        """Do a piece of what the drafter has to read; False when there is nothing to do."""
        for generation, reader in self._readers.items():
            if reader.step():
                del self._readers[generation]
            return True
        return False

    def judged(self, generation: Generation, drafted: int, accepted: int) -> None:
        """Learn how many tokens of a sequence's draft were right; it may have had none."""
        pace = self._paces.get(generation)
        if pace is not None:
            pace.record(drafted, accepted)

    def computed(self, n_tokens: int, seconds: float) -> None:
        """Learn what a step with so many tokens, of all sequences, took."""
        self._costs.record(n_tokens, seconds)

    def forget(self, generation: Generation) -> None:
        """A sequence has ended; what the drafter holds of it may serve the next one there."""
        self._paces.pop(generation, None)
        reader = self._readers.pop(generation, None)
        if reader is not None:
            reader.cancel()

    def close(self) -> None:
        """Free what the drafter holds."""
        self._drafter.close()
