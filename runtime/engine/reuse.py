"""Which sequence a prompt is read into, and how many of its tokens are there already. Pure decisions, no library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ziggurat.runtime.engine.slots import Slot

#: Fewer tokens than these are not reused: they are read sooner than a sequence with them is copied, and a prompt that
#: begins with nothing can be read beside others where one that goes on cannot.
LEAST_REUSE = 16


@dataclass(frozen=True)
class Placement:
    """Where a prompt goes: a sequence, after ``reused`` tokens, which come from ``source`` when they are elsewhere."""

    slot: int
    reused: int = 0
    source: int | None = None


def common_prefix(a: Sequence[int], b: Sequence[int], start: int = 0) -> int:
    """Return how many tokens two sequences have in common from the beginning; the first ``start`` are known to be."""
    end = min(len(a), len(b))
    while start < end and list(a[start : start + 256]) == list(b[start : start + 256]):
        start = min(start + 256, end)
    while start < end and a[start] == b[start]:
        start += 1
    return start


def usable(prompt: Sequence[int], held: Slot, *, reread: bool) -> int:
    """Return how many of a prompt's tokens need not be read again on what a sequence holds.

    The last one always has to be, for its logits. Rows that were chosen for another end of the text do not serve: what
    follows them can be removed only as far as nothing was evicted since. With ``reread`` a sequence that anything was
    evicted from is of no use at all.
    """
    if held.reading or (reread and held.evicted):
        return 0
    common = min(common_prefix(prompt, held.tokens), len(prompt) - 1)
    if common < LEAST_REUSE:
        return 0
    return common if common == len(held.tokens) or common >= held.removable_from else 0


def worth_waiting(saved: int, unread: int, n_left: int) -> bool:
    """Whether a prompt with so many unread tokens had better wait until the ``n_left`` of another one are read.

    It then has ``saved`` of its own to read no more. Else the two are read in turns, both in twice the time.
    """
    return saved >= LEAST_REUSE and n_left < unread + saved


def oldest(slot: Slot) -> tuple[bool, int, int]:
    """Order sequences by what is lost least: empty ones, then those used longest ago."""
    return bool(slot.tokens), slot.last_used if slot.tokens else 0, slot.index


def place(
    prompt: Sequence[int], slots: Iterable[Slot], *, conversation: str | None = None, reread: bool = False
) -> Placement | None:
    """Choose a sequence for a prompt; None when all are busy.

    The sequence with the most to reuse is continued where that is most of what it holds and it was not copied to be
    copied, it is the same conversation's, or no other is free; else the tokens are copied into another one, the
    emptiest and then the least recently used.
    """
    slots = list(slots)
    free = [held for held in slots if not held.busy]
    if not free:
        return None
    counts = {held.index: usable(prompt, held, reread=reread) for held in slots}

    def worth(held: Slot) -> tuple[int, bool, bool, int]:
        same = conversation is not None and held.conversation == conversation
        return counts[held.index], not held.busy, same, held.last_used

    best = max(slots, key=worth)
    count = counts[best.index]
    same = conversation is not None and best.conversation == conversation
    others = [held for held in free if held is not best or not count]
    most = 2 * count >= len(best.tokens) and not best.apart
    if count and not best.busy and (same or most or not others):
        return Placement(best.index, count)
    own = [held for held in free if conversation is not None and held.conversation == conversation]
    target = min(own or others or free, key=oldest)
    if target is not best and count > counts[target.index]:
        return Placement(target.index, count, best.index)
    return Placement(target.index, counts[target.index])
