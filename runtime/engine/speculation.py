"""Speculation: tokens are proposed, and one step of the model checks several of them.

A ``Drafter`` proposes what may follow (``ngram``, ``draft_model``), ``pace`` says how many tokens are worth it; the
scheduler puts a sequence's pending token and its drafts into one batch, and ``verified`` chooses.

Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding". Deviation: drafts are
single tokens without a distribution of their own, and the sequence's sampler chooses at every position as it would have
without them. So nothing has to be corrected, and a seed gives the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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
        """Return what may follow each sequence: up to its limit, or nothing. Never raises ZigguratError."""
        ...

    def reader(self, slot: int, tokens: Sequence[int]) -> Reader | None:
        """Return the work there is before tokens of a prompt can be drafted, None if there is none.

        Drafting needs none of it to be done: what is missing is then caught up with a piece in every call.
        """
        ...

    def forget(self, slot: int) -> None:
        """Drop what is kept of a slot."""
        ...

    def close(self) -> None:
        """Free what it holds. Idempotent."""
        ...


def common_prefix(a: Sequence[int], b: Sequence[int], start: int = 0) -> int:
    """Return how many tokens two sequences have in common from the beginning; the first ``start`` are known to be."""
    end = min(len(a), len(b))
    while start < end and list(a[start : start + 256]) == list(b[start : start + 256]):
        start = min(start + 256, end)
    while start < end and a[start] == b[start]:
        start += 1
    return start


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


class Either:
    """Asks one drafter, and another for the sequences for which the first knows nothing.

    For prompt lookup, which costs nothing, before a draft model.
    """

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self._drafters = first, second

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Return the first's proposals, the second's where there are none."""
        first, second = self._drafters
        drafts = first.draft(wanted)
        missing = [index for index, draft in enumerate(drafts) if not draft]
        if missing:
            for index, draft in zip(missing, second.draft([wanted[index] for index in missing]), strict=True):
                drafts[index] = draft
        return drafts

    def reader(self, slot: int, tokens: Sequence[int]) -> Reader | None:
        """Return the work of both, one after the other."""
        readers = [reader for drafter in self._drafters if (reader := drafter.reader(slot, tokens)) is not None]
        return _InTurn(readers) if readers else None

    def forget(self, slot: int) -> None:
        """Let both forget a slot."""
        for drafter in self._drafters:
            drafter.forget(slot)

    def close(self) -> None:
        """Close both."""
        for drafter in self._drafters:
            drafter.close()


class _InTurn:
    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = list(readers)
        self._count = len(readers)

    def step(self) -> bool:
        if self._readers and self._readers[0].step():
            del self._readers[0]
        return not self._readers

    def cancel(self) -> None:
        for reader in self._readers:
            reader.cancel()

    @property
    def progress(self) -> float:
        done = self._count - len(self._readers)
        return (done + (self._readers[0].progress if self._readers else 0.0)) / self._count
