"""Speculation: tokens are proposed, and one step of the model checks several of them.

A ``Drafter`` (``ngram``, ``draft_model``) proposes what may follow, as much as by ``pace`` is worth it. The scheduler
asks ``Speculation``, puts a sequence's pending token and its drafts into one batch, and lets ``verified`` choose.

Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding". Deviation: drafts are
single tokens without a distribution of their own, and the sequence's sampler chooses at every position as it would have
without them. So nothing has to be corrected, and a seed gives the same text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ziggurat.runtime.engine.pace import Costs, Pace, Price, shares

if TYPE_CHECKING:
    pass

_logger = logging.getLogger(__name__)

#: Tokens that can be proposed for one sequence in one step: with its pending token 16, which a sequence with a KV
#: budget can be set back by.
MAX_DRAFT = 15


class Reader(Protocol):
    """Reads a prompt in small pieces of work, between which other sequences go on."""

    def step(self) -> bool:
        """Do one piece of work; True when nothing is left to do."""
        ...

    def cancel(self) -> None:
        """Give it up; nothing happens when it has ended."""
        ...

    @property
    def progress(self) -> float:
        """The part of the work that is done, 0.0 to 1.0."""
        ...


@dataclass(frozen=True)
class Wanted:
    """A sequence that wants drafts: at most ``limit`` tokens, 1 to ``MAX_DRAFT``, after ``tokens``.

    ``slot`` is its id in the target's context. ``tokens`` are all of the sequence, prompt and generated, the pending
    one last; they may be a list that is only ever appended to between two calls of ``Drafter.forget``.
    """

    slot: int
    tokens: Sequence[int]
    limit: int


class Drafter(Protocol):
    """Proposes tokens. It belongs to the engine's thread, and keeps what it needs of each slot until ``forget``."""

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Return what may follow each sequence: up to its limit, or nothing. Never raises ZigguratError.

        Nothing for a sequence of which there is more to read, see ``reader``.
        """
        ...

    def reader(self, slot: int, tokens: Sequence[int]) -> Reader | None:
        """Return what there is to read before tokens can be drafted, None if nothing is, or it cannot be read.

        The reading goes on with the one that was returned before, if that reads the beginning of these tokens.
        """
        ...

    def forget(self, slot: int) -> None:
        """Drop what is kept of a slot."""
        ...

    def close(self) -> None:
        """Free what it holds. Idempotent."""
        ...


def verified(drafted: Sequence[int], sample: Callable[[int], int | None]) -> Iterator[int]:
    """Yield the tokens that a sequence gets from one step: accepted drafts, then one that was not drafted.

    ``sample(i)`` chooses after the pending token (0) or the i-th draft, and is called once for each token, only when
    the token is asked for: whoever stops iterating has drawn no more than without drafts. None ends the sequence.
    """
    for index in range(len(drafted) + 1):
        token = sample(index)
        if token is None:
            return
        yield token
        if index == len(drafted) or token != drafted[index]:
            return


class Speculation:
    """What the scheduler asks each step: proposes tokens, and learns how many are worth it.

    ``drafters`` are asked in this order, each for the sequences for which those before had nothing: prompt lookup,
    which costs nothing, before a draft model. At most ``limit`` tokens are proposed for a sequence. A drafter that
    fails is logged and not asked any more.
    """

    def __init__(
        self, drafters: Sequence[Drafter], limit: int = MAX_DRAFT, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.costs = Costs()
        self.limit = min(limit, MAX_DRAFT)
        self._clock = clock
        self._sources = [_Source(drafter) for drafter in drafters]
        self._used: dict[int, _Source] = {}  # whose drafts a slot has in this step

    def propose(self, wanted: Sequence[Wanted], others: int = 0) -> list[list[int]]:
        """Return drafts, or none, for sequences of a step in which ``others`` have one token each and no drafts.

        ``record`` has to follow.
        """
        self._used.clear()
        drafts: list[list[int]] = [[] for _ in wanted]
        for source in self._sources:
            missing = [index for index, draft in enumerate(drafts) if not draft]
            if not missing or source.failed:
                continue
            asked = [wanted[index] for index in missing]
            taken = sum(len(draft) for draft in drafts) + len(wanted) - len(missing) + others
            for index, draft in zip(missing, self._ask(source, asked, taken), strict=True):
                drafts[index] = draft
                if draft:
                    self._used[wanted[index].slot] = source
        return drafts

    def _ask(self, source: _Source, wanted: Sequence[Wanted], others: int) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in wanted]
        paces = [source.paces.setdefault(each.slot, Pace()) for each in wanted]
        limits = [min(each.limit, self.limit) for each in wanted]
        lengths = shares(paces, limits, self.costs, price=source.price.seconds, others=others)
        try:
            ready = [
                (index, replace(each, limit=length))
                for index, (each, length) in enumerate(zip(wanted, lengths, strict=True))
                if length and self._read(source, each)
            ]
            if ready:
                started = self._clock()
                found = source.drafter.draft([each for _, each in ready])
                seconds = self._clock() - started
                source.price.record(max(map(len, found)), seconds)
                for (index, _), draft in zip(ready, found, strict=True):
                    drafts[index] = draft
                tried = sum(len(drafts[index]) for index, _ in ready if paces[index].trying)
                if any(paces[index].trying for index, _ in ready):
                    base = others + len(wanted)
                    self.costs.allowance -= seconds + max(0.0, self.costs.step(base + tried) - self.costs.step(base))
        except Exception:  # whatever is wrong with a drafter must not end the requests that it helps
            source.failed = True
            _logger.exception("%s failed and is not used any more", type(source.drafter).__name__)
            return [[] for _ in wanted]
        return drafts

    def _read(self, source: _Source, wanted: Wanted) -> bool:
        """Let a drafter read a piece of what it misses of a sequence; True when it misses nothing."""
        reader = source.drafter.reader(wanted.slot, wanted.tokens)
        if reader is None:
            return True
        started = self._clock()
        reader.step()
        self.costs.allowance -= self._clock() - started
        return False

    def record(self, results: Mapping[int, tuple[int, int]], n_tokens: int, seconds: float) -> None:
        """Tell what became of a step: by slot the drafts it had and those accepted; its tokens, and seconds."""
        self.costs.record(n_tokens, seconds)
        for slot, (drafted, accepted) in results.items():
            for source in self._sources:
                if slot in source.paces:
                    mine = self._used.get(slot) is source
                    source.paces[slot].record(drafted if mine else 0, accepted)

    def begin(self, slot: int) -> None:
        """Let a new request have a slot: what was learned of the last one's text does not count."""
        for source in self._sources:
            source.paces.pop(slot, None)

    def forget(self, slot: int) -> None:
        """Let the drafters drop what they keep of a slot."""
        self.begin(slot)
        for source in self._sources:
            if not source.failed:
                source.drafter.forget(slot)

    def close(self) -> None:
        """Close the drafters. Idempotent."""
        for source in self._sources:
            source.drafter.close()


class _Source:
    """A drafter with what is known of it."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.price = Price()
        self.paces: dict[int, Pace] = {}
        self.failed = False
