"""Which blocks go: what was asked for, guards, and the three criteria, as arithmetic on measurements.

Sources: block influence, Men et al., "ShortGPT" (arXiv 2403.03853); angular distance of contiguous runs, Gromov et
al., "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887); greedy perplexity, Song et al.,
"SLEB" (arXiv 2402.09025). Here no criterion ever takes the first or the last block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ziggurat.converter.errors import PruneError

Criterion = Literal["influence", "angular", "perplexity"]
CRITERIA: tuple[Criterion, ...] = ("influence", "angular", "perplexity")

# Blocks at either end that always stay. Without a block before it a removed one could not be repaired either.
GUARD_FIRST = GUARD_LAST = 1


@dataclass(frozen=True)
class PruneSettings:
    """Which blocks to remove and how: exactly one of `count`, `percent` and `blocks`."""

    count: int | None = None
    percent: float | None = None
    blocks: tuple[int, ...] = ()
    """Indices of blocks of the checkpoint, instead of a criterion."""
    by: Criterion = "influence"
    repair: bool = True
    uncorrected: tuple[int, ...] = ()
    """Blocks that the repair leaves as they are."""


def prune_settings(
    amount: str | None, blocks: str | None, by: str | None, *, repair: bool = True
) -> PruneSettings | None:
    """What `--prune`, `--prune-blocks`, `--prune-by` and `--no-repair` ask for; None: nothing.

    Raises:
        PruneError: they contradict each other, or one of them cannot be read.
    """
    if amount is not None and blocks is not None:
        raise PruneError("--prune and --prune-blocks exclude each other: give one of them")
    if amount is None and by is not None:
        raise PruneError("--prune-by needs --prune: a number of blocks to choose")
    if amount is None and blocks is None:
        if not repair:
            raise PruneError("--no-repair needs --prune or --prune-blocks: without them nothing is repaired")
        return None
    if blocks is not None:
        return PruneSettings(blocks=parse_blocks(blocks), repair=repair)
    count, percent = parse_amount(amount or "")
    criterion = next((name for name in CRITERIA if name == (by or "influence")), None)
    if criterion is None:
        raise PruneError(f"there is no criterion {by!r}: choose one of {', '.join(CRITERIA)}")
    return PruneSettings(count=count, percent=percent, by=criterion, repair=repair)


def parse_amount(text: str) -> tuple[int | None, float | None]:
    """Read `--prune`: a number of blocks, or a share of them like "12.5%". Returns (count, percent), one of them None.

    Raises:
        PruneError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+)(\.\d+)?\s*(%)?\s*", text, re.ASCII)
    if match is None or (match[2] and not match[3]):
        raise PruneError(f"--prune {text!r} is neither a number of blocks nor a share like 12.5%")
    amount = float(match[1] + (match[2] or ""))
    if amount == 0:
        raise PruneError(f"--prune {text} removes nothing: leave it out")
    if not match[3]:
        return int(match[1]), None
    if amount >= 100:
        raise PruneError(f"--prune {text} would leave no block: choose less")
    return None, amount


def parse_blocks(text: str) -> tuple[int, ...]:
    """Read `--prune-blocks`: indices from 0 and ranges with both ends, "5,8-10". Sorted, without repetitions.

    Raises:
        PruneError: it is no such list.
    """
    blocks: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part, re.ASCII)
        if match is None:
            raise PruneError(f"--prune-blocks {text!r} is no list of block numbers like 5,8-10 (the first is 0)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise PruneError(f"--prune-blocks {text!r}: the range {part.strip()} runs backwards")
        blocks.update(range(first, last + 1))
    return tuple(sorted(blocks))


def number_to_remove(settings: PruneSettings, n_layer: int) -> int:
    """How many blocks of `n_layer` go; a share is rounded to the nearest number of blocks.

    Raises:
        PruneError: none, or more than the guards allow.
    """
    if settings.percent is not None:
        n = int(settings.percent * n_layer / 100 + 0.5)
        asked = f"{settings.percent:g}% of {n_layer} blocks"
        if n == 0:
            raise PruneError(f"{asked} is less than half a block: ask for at least {100 / n_layer:.1f}%")
    else:
        n, asked = settings.count or 0, f"{settings.count} blocks"
    _check_number(n, asked, n_layer)
    return n


def _check_number(n: int, asked: str, n_layer: int) -> None:
    most = n_layer - GUARD_FIRST - GUARD_LAST
    if n > n_layer:
        raise PruneError(f"{asked} cannot be removed: the model has {n_layer}")
    if n > most:
        least = f"at most {most}" if most > 0 else "none"
        raise PruneError(
            f"{asked} cannot be removed: of {n_layer} the first and the last always stay, so {least} can go"
        )


def check_blocks(blocks: Sequence[int], n_layer: int) -> tuple[int, ...]:
    """The blocks of `--prune-blocks` for a model of `n_layer` blocks, sorted.

    Raises:
        PruneError: one of them does not exist, or has to stay.
    """
    for block in sorted(blocks):
        if not 0 <= block < n_layer:
            raise PruneError(f"there is no block {block}: the model has blocks 0 to {n_layer - 1}")
    for block in sorted(blocks):
        if block not in removable(n_layer):
            which = "first" if block < GUARD_FIRST else "last"
            raise PruneError(f"block {block} is the {which} one, which always stays: leave it out of --prune-blocks")
    return tuple(sorted(set(blocks)))


def removable(n_layer: int) -> range:
    """The blocks that a criterion may choose."""
    return range(GUARD_FIRST, n_layer - GUARD_LAST)


def by_influence(influence: npt.NDArray[np.float64], n: int) -> tuple[int, ...]:
    """The `n` removable blocks of lowest influence; `influence` of shape [n_layer]. Ties: the later block."""
    blocks = sorted(removable(len(influence)), key=lambda i: (influence[i], -i))
    return tuple(sorted(blocks[:n]))


def by_angular(angular: npt.NDArray[np.float64], n: int) -> tuple[int, ...]:
    """The run of `n` removable blocks over which the hidden state turns least. Ties: the later run.

    `angular` of shape [n_layer, n_layer + 1]: mean distance, in units of pi, between the hidden states before block i
    and before block j (j = n_layer: after the last).
    """
    allowed = removable(angular.shape[0])
    starts = range(allowed.start, allowed.stop - n + 1)
    start = min(starts, key=lambda i: (angular[i, i + n], -i))
    return tuple(range(start, start + n))


def by_perplexity(
    losses: Callable[[tuple[int, ...], Sequence[int]], Sequence[float]],
    n_layer: int,
    n: int,
    before: tuple[int, ...] = (),
) -> tuple[int, ...]:
    """Remove, `n` times, the block whose removal, after the ones before, costs least.

    Args:
        losses: given the blocks removed so far and candidates, the mean loss without the former and each candidate.
        n_layer: blocks of the model.
        n: how many to remove.
        before: the choice of fewer, to go on from.

    Raises:
        PruneError: every candidate's loss is no number.
    """
    removed = before
    while len(removed) < n:
        candidates = [i for i in removable(n_layer) if i not in removed]
        measured = dict(zip(candidates, losses(removed, candidates), strict=True))
        finite = [i for i in candidates if np.isfinite(measured[i])]
        if not finite:
            raise PruneError("the calibration gives no finite perplexity: the checkpoint's weights are damaged")
        removed = (*removed, min(finite, key=lambda i: (measured[i], -i)))
    return tuple(sorted(removed))


def runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """The contiguous runs among `blocks`: (first block, number of blocks), in order."""
    found: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if found and sum(found[-1]) == block:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((block, 1))
    return found
