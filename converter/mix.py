"""Which type every tensor gets in a file of a given size: the smallest summed loss that fits.

A multiple-choice knapsack. The greedy walk along the convex hulls of the tensors' candidates (which is also the
solution of the relaxed problem, by Sinha and Zoltners, 1979) gives a first answer and a bound; then all sums that could
still be better than it are enumerated, the dominated ones left out. Where those are too many, the best by their bound
go on: the answer is then the best that was found, not proven to be the best there is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ziggurat.converter.errors import ConvertError

# Sums that are kept after each tensor.
MOST_SUMS = 1 << 14

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip

_Reals = npt.NDArray[np.float64]
_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Target:
    """How large the file is to be; one of the two is set."""

    bytes: int | None = None
    """Of the whole file."""
    bits_per_weight: float | None = None
    """Bits of tensor data per parameter, as `report.Report` has them."""

    @property
    def text(self) -> str:
        """As the user wrote it, or nearly."""
        return f"--bpw {self.bits_per_weight:g}" if self.bytes is None else f"--size {self.bytes}"

    def capacity(self, header: int, parameters: int) -> int:
        """Bytes that all tensors' data may have, in a file that has `header` others before them."""
        if self.bytes is not None:
            return self.bytes - header
        assert self.bits_per_weight is not None
        return int(self.bits_per_weight * parameters / 8)


def target(bpw: float | None, size: str | None) -> Target | None:
    """What `--bpw` and `--size` ask for; None for neither.

    Raises:
        ConvertError: both are given, or one is no size.
    """
    if bpw is not None and size is not None:
        raise ConvertError("--bpw and --size exclude each other: give one")
    if bpw is not None:
        if not 0 < bpw < float("inf"):
            raise ConvertError(f"--bpw {bpw:g} is no number of bits: give one between 2 and 8.5, such as 4.5")
        return Target(bits_per_weight=bpw)
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", size, re.IGNORECASE)
    unit = UNITS.get(match[2].upper() or "B") if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise ConvertError(
            f"--size {size!r} is no size: give a number of bytes, such as 33GB (10^9 each) or 33GiB (2^30 each)"
        )
    return Target(bytes=int(float(match[1]) * unit))


@dataclass(frozen=True)
class Candidate:
    """A type that a tensor could have."""

    type_id: int
    bytes: int
    """Of the tensor in the file."""
    loss: float
    """What the model loses by it; finite."""


def choose(groups: Sequence[Sequence[Candidate]], capacity: int) -> list[Candidate]:
    """One candidate of each group, so that the sum of their losses is smallest and that of their bytes fits.

    The same input gives the same choice; of equal losses the smaller bytes win.

    Args:
        groups: candidates of each tensor, at least one.
        capacity: bytes that all of them together may have; at least those of the smallest.
    """
    useful = [_undominated(group) for group in groups]
    assert sum(group[0].bytes for group in useful) <= capacity
    first, price = _greedy(useful, capacity)
    return _search(useful, capacity, first, price)


def _undominated(group: Sequence[Candidate]) -> list[Candidate]:
    """Candidates, each larger and of less loss than the one before."""
    kept: list[Candidate] = []
    for candidate in sorted(group, key=lambda c: (c.bytes, c.loss, c.type_id)):
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return kept


def _hull(group: Sequence[Candidate]) -> list[Candidate]:
    """Those on the lower convex hull: from one to the next the loss falls ever less per byte."""
    hull: list[Candidate] = []
    for candidate in group:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


def _gain(small: Candidate, large: Candidate) -> float:
    return (small.loss - large.loss) / (large.bytes - small.bytes)


def _numbered_pairs(hull: Sequence[Candidate]) -> Iterable[tuple[int, tuple[Candidate, Candidate]]]:
    return enumerate(itertools.pairwise(hull))


def _greedy(groups: Sequence[Sequence[Candidate]], capacity: int) -> tuple[list[Candidate], float]:
    """A choice that fits, and the price of a byte: the gain of the first step up that did not fit."""
    hulls = [_hull(group) for group in groups]
    chosen = [hull[0] for hull in hulls]
    left = capacity - sum(c.bytes for c in chosen)
    steps = sorted(
        (-_gain(a, b), group, i)
        for group, hull in enumerate(hulls)
        for i, (a, b) in enumerate(itertools.pairwise(hull))
    )
    price: float | None = None
    for minus_gain, group, i in steps:
        step = hulls[group][i + 1].bytes - hulls[group][i].bytes
        if chosen[group] is hulls[group][i] and step <= left:
            chosen[group], left = hulls[group][i + 1], left - step
        elif price is None:
            price = -minus_gain
    return chosen, price or 0.0


def _search(
    groups: Sequence[Sequence[Candidate]], capacity: int, first: list[Candidate], price: float
) -> list[Candidate]:
    """The best choice, or `first` if there is none better.

    A candidate's excess is what its loss, with its bytes at `price`, is above the least of its group. The loss of a
    choice is the bound, plus its excesses, plus the price of the bytes that it leaves unused: so none whose excesses
    are together above the gap between `first` and the bound can be better.
    """
    bytes_, excess = [], []
    bound = -price * capacity
    for group in groups:
        cost = np.array([c.loss + price * c.bytes for c in group])
        bound += float(cost.min())
        bytes_.append(np.array([c.bytes for c in group], np.int64))
        excess.append(cost - cost.min())
    gap = max(sum(c.loss for c in first) - bound, 0.0) * (1 + 1e-9)
    # Groups with many candidates in question last: the sums stay few for longer.
    order = sorted(range(len(groups)), key=lambda i: (int((excess[i] <= gap).sum()), i))
    smallest = np.cumsum([0] + [int(bytes_[i].min()) for i in reversed(order)])[::-1]  # of all groups from here on
    sums, excesses = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[_Counts, _Counts]] = []
    for step, i in enumerate(order):
        options = np.flatnonzero(excess[i] <= gap)
        new_sums = (sums[:, None] + bytes_[i][options]).ravel()
        new_excesses = (excesses[:, None] + excess[i][options]).ravel()
        fits = (new_sums + smallest[step + 1] <= capacity) & (new_excesses <= gap)
        kept = np.flatnonzero(fits)
        kept = kept[_frontier(new_sums[kept], new_excesses[kept] - price * new_sums[kept])]
        if len(kept) > MOST_SUMS:
            best = np.argsort(new_excesses[kept], kind="stable")[:MOST_SUMS]
            kept = kept[np.sort(best)]
        trail.append((kept // len(options), options[kept % len(options)]))
        sums, excesses = new_sums[kept], new_excesses[kept]
    if not len(sums):
        return first
    chosen = list(first)
    at = int(np.argmin(excesses - price * sums))
    for i, (parent, option) in zip(reversed(order), reversed(trail), strict=True):
        chosen[i] = groups[i][int(option[at])]
        at = int(parent[at])
    better = (sum(c.loss for c in chosen), sum(c.bytes for c in chosen)) < (
        sum(c.loss for c in first),
        sum(c.bytes for c in first),
    )
    return chosen if better else first


def _frontier(sums: _Counts, losses: _Reals) -> _Counts:
    """Places of the sums than which no other is smaller and of no more loss, by rising sum."""
    order = np.lexsort((losses, sums))
    least = np.minimum.accumulate(losses[order])
    new = np.ones(len(order), bool)
    new[1:] = losses[order][1:] < least[:-1]
    return order[new]
