"""Prompt lookup: what followed the last tokens when they occurred before is proposed again.

Sources: Saxena, "Prompt Lookup Decoding"; llama.cpp's ``examples/lookup``. Deviations: the index is kept and grows with
the sequence instead of being searched, and a match that reaches the sequence's end goes on with its own proposal, so
that a repetition is continued whatever its period.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ziggurat.runtime.engine.reuse import common_prefix
from ziggurat.runtime.engine.speculation import Reader, Wanted

#: Lengths of the matches that are looked for, in this order.
LENGTHS = (4, 3)
# tokens indexed in one step of a reader, which takes a few milliseconds
_PIECE = 4096
# of a token id in a key
_BITS = 21


class NgramDrafter:
    """Proposes the continuation of the longest, most recent earlier occurrence of a sequence's end.

    Never one of ``ends``: the model chooses an end after the last accepted token anyway. Takes about 200 bytes of
    memory for each token of a slot.
    """

    def __init__(self, ends: Collection[int] = (), lengths: Sequence[int] = LENGTHS) -> None:
        self._ends = frozenset(ends)
        self._lengths = tuple(sorted(lengths, reverse=True))
        self._slots: dict[int, _Index] = {}

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Return what followed before; nothing where the end of a sequence is new."""
        return [self._draft(each) for each in wanted]

    def _draft(self, wanted: Wanted) -> list[int]:
        index = self._index(wanted.slot, wanted.tokens)
        found = index.continuation(wanted.limit) if index.grow(_PIECE) else []
        return found[: next((at for at, token in enumerate(found) if token in self._ends), None)]

    def reader(self, slot: int, tokens: Sequence[int]) -> Reader | None:
        """Return the indexing of a long prompt."""
        index = self._index(slot, tokens)
        return _IndexReader(index) if index.missing > _PIECE else None

    def _index(self, slot: int, tokens: Sequence[int]) -> _Index:
        index = self._slots.get(slot)
        if index is None or not index.follow(tokens):
            index = self._slots[slot] = _Index(self._lengths, tokens)
        return index

    def forget(self, slot: int) -> None:
        """Drop a slot's index."""
        self._slots.pop(slot, None)

    def close(self) -> None:
        """Drop all of them."""
        self._slots.clear()


class _Index:
    """Where each n-gram of a sequence occurred last: the position after it. A key is made of an n-gram's token ids."""

    def __init__(self, lengths: Sequence[int], tokens: Sequence[int]) -> None:
        self._tables: list[tuple[int, int, dict[int, int]]] = [
            (length, (1 << _BITS * length) - 1, {}) for length in lengths
        ]
        self._tokens = tokens
        self._seen: list[int] = []  # of the tokens, those whose n-grams are indexed
        self._key = 0  # of the last of them, as many as the longest n-gram has

    @property
    def missing(self) -> int:
        """Tokens that are not indexed yet; the last one never is, nothing follows it."""
        return len(self._tokens) - 1 - len(self._seen)

    def follow(self, tokens: Sequence[int]) -> bool:
        """Go on with these tokens if they begin with those that were indexed."""
        if tokens is not self._tokens:
            if common_prefix(self._seen, tokens) < len(self._seen):
                return False
            self._tokens = tokens
        return len(self._seen) < len(tokens)

    def grow(self, count: int) -> bool:
        """Index at most so many further tokens; True when none is missing."""
        seen, key, widest = self._seen, self._key, self._tables[0][1]
        for token in self._tokens[len(seen) : len(seen) + min(count, self.missing)]:
            seen.append(token)
            key = (key << _BITS | token) & widest
            end = len(seen)
            for length, mask, table in self._tables:
                if end >= length:
                    table[key & mask] = end
        self._key = key
        return self.missing <= 0

    def continuation(self, limit: int) -> list[int]:
        """Return up to ``limit`` tokens that followed the longest end of the sequence that occurred before."""
        tokens, total = self._tokens, len(self._tokens)
        key = self._key << _BITS | tokens[-1]
        for length, mask, table in self._tables:
            start = table.get(key & mask) if total > length else None
            if start is not None:
                found: list[int] = []
                for position in range(start, start + limit):
                    found.append(tokens[position] if position < total else found[position - total])
                return found
        return []


class _IndexReader:
    def __init__(self, index: _Index) -> None:
        self._index = index
        self._total = index.missing

    def step(self) -> bool:
        return self._index.grow(_PIECE)

    def cancel(self) -> None:
        """What is indexed stays: it is right."""

    @property
    def progress(self) -> float:
        return 1 - max(0, self._index.missing) / self._total
