"""Which rows of a conversation a model still holds, and how dense they are along its text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

#: Rows that stand in a row: the first position, and how many.
Run = tuple[int, int]


@dataclass(frozen=True)
class KeptLayer:
    """One layer: its budget after a prompt, and the runs of each head.

    The budget is in rows per head; None when every row is kept, 0 for a layer with a sliding window, which has none.
    """

    layer: int
    budget: int | None
    heads: tuple[tuple[Run, ...], ...]

    @property
    def rows(self) -> float:
        """Mean number of rows of its heads."""
        if not self.heads:
            return 0.0
        return sum(length for runs in self.heads for _, length in runs) / len(self.heads)


@dataclass(frozen=True)
class Kept:
    """The rows of a conversation. ``tokens`` are all that it has seen, in order; ``layers`` is empty without a budget.

    Without a budget every row is there.
    """

    conversation: str
    tokens: tuple[int, ...]
    layers: tuple[KeptLayer, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing was evicted because there is no budget."""
        return not self.layers

    def strip(self, layer: int, columns: int) -> tuple[float, ...]:
        """Return which part of the rows survived, 0.0 to 1.0 over all heads, in each of ``columns`` equal stretches.

        ``layer`` is a place in ``layers``. There are never more columns than tokens.
        """
        edges = self.edges(columns)
        held = _held(self.layers[layer].heads, edges)
        heads = max(len(self.layers[layer].heads), 1)
        sizes = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
        return tuple(count / max(size * heads, 1) for count, size in zip(held, sizes, strict=True))

    def stretch(self, column: int, columns: int) -> tuple[int, ...]:
        """Return the tokens that one column of ``strip`` stands for."""
        edges = self.edges(columns)
        return self.tokens[edges[column] : edges[column + 1]]

    def edges(self, columns: int) -> list[int]:
        """Return the positions between which the columns lie: one more than there are columns."""
        n_tokens = len(self.tokens)
        columns = max(min(columns, n_tokens), 1)
        return [column * n_tokens // columns for column in range(columns + 1)]


def _held(heads: Sequence[Sequence[Run]], edges: Sequence[int]) -> list[int]:
    """Count the rows between the edges, over all heads."""
    held = [0] * (len(edges) - 1)
    for runs in heads:
        for start, length in runs:
            column = max(bisect_left(edges, start + 1) - 1, 0)
            end = start + length
            while start < end and column < len(held):
                stop = min(end, edges[column + 1])
                held[column] += stop - start
                start, column = stop, column + 1
    return held
