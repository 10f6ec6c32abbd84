"""The sequences of the context: what each holds, and the moves between them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ziggurat.runtime.bindings import Context
from ziggurat.runtime.engine.reuse import LEAST_REUSE, oldest, place, usable
from ziggurat.runtime.errors import ContextError

if TYPE_CHECKING:
    from ziggurat.runtime.engine.admission import Job
    from ziggurat.runtime.engine.generation import Generation

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Slot:
    """A sequence. ``tokens`` are those whose rows are there or were evicted.

    ``removable_from``: from this position on its end can be removed. ``rows`` it held and ``evicted`` ones it held no
    more, per KV head over all layers, are as last measured. ``budgets`` are the rows per layer that its next selection
    leaves, ``last_used`` grows with each use. ``apart``: it was copied here for prompts to begin with.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    removable_from: int = 0
    rows: int = 0
    evicted: int = 0
    conversation: str | None = None
    last_used: int = 0
    budgets: tuple[int, ...] = ()
    apart: bool = False
    generation: Generation | None = None

    @property
    def busy(self) -> bool:
        """Whether a request runs on it."""
        return self.generation is not None

    @property
    def reading(self) -> bool:
        """Whether a prompt is being read into it."""
        return self.generation is not None and self.generation.reading


class Slots:
    """All sequences of one context; used in the engine's thread."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.all = tuple(Slot(index) for index in range(context.settings.n_seq_max))
        self._time = 0

    def prepare(self, job: Job) -> tuple[Slot, int]:
        """Choose a sequence that is not busy and put it into the state a prompt continues from.

        Returns it and the number of tokens that it has; a copy that the library refuses is read instead. Raises what
        the library raises; there has to be a sequence that is not busy.
        """
        request = job.request
        for slot in self.all:
            if slot.busy and not slot.reading:  # what it can be copied for changes as it decodes
                self.measure(slot)
        placement = place(job.tokens, self.all, conversation=request.conversation, reread=request.reread)
        assert placement is not None, "the scheduler asks when there is a free sequence"
        slot, reused = self.all[placement.slot], placement.reused
        if placement.source is not None:
            source = self.all[placement.source]
            aside = self._aside(slot)
            if source is aside and source is not slot:  # what it holds moves to where there is room
                source = slot
            slot = self._replace(slot, aside)
            reused = self._copy(source, slot, reused)
        elif not reused:
            slot = self._replace(slot, self._aside(slot))
            self.clear(slot)
        else:
            slot = self._shift(slot, self._aside(slot))
            reused = min(reused, len(slot.tokens))
        if reused < len(slot.tokens):
            self.cut(slot, reused)
            reused = len(slot.tokens)
        self.touch(slot)
        slot.apart = False
        self.name(slot, request.conversation)
        return slot, reused

    def fork(self, source: Slot) -> Slot | None:
        """Copy a sequence as it is into one that is not busy; None when the library refuses, or all are."""
        free = [other for other in self.all if not other.busy and other is not source]
        if not free:
            return None
        target = min(free, key=oldest)
        target = self._replace(target, self._aside(target))
        if not self._copy(source, target, len(source.tokens)):
            return None
        self.touch(target)
        target.apart = False
        return target

    def _aside(self, slot: Slot) -> Slot:
        """Return the free sequence in whose place a prompt had better run: beside those in use.

        llama.cpp computes only sequences together whose numbers follow each other: a hole between those in use costs
        one more pass over the weights in every step, which is longer than moving a sequence takes.
        """
        busy = {other.index for other in self.all if other.busy}
        if not busy or {slot.index - 1, slot.index + 1} & busy:
            return slot
        near = [other for other in self.all if not other.busy and {other.index - 1, other.index + 1} & busy]
        return min(near, key=oldest, default=slot)

    def _replace(self, slot: Slot, aside: Slot) -> Slot:
        """Take a sequence aside of the one whose content goes, which gets what it held."""
        if aside is not slot and aside.tokens:
            self._move(aside, slot)
        return aside

    def _shift(self, slot: Slot, aside: Slot) -> Slot:
        """Move a sequence that is to go on aside; what was there takes the place of what was used longest ago."""
        if aside is slot:
            return slot
        others = [other for other in self.all if not other.busy and other is not slot]
        victim = min(others, key=oldest)
        if aside.tokens and victim is not aside:
            self._move(aside, victim)
        self._move(slot, aside)
        return aside

    def _move(self, source: Slot, target: Slot) -> None:
        last_used, conversation, apart = source.last_used, source.conversation, source.apart
        if self._copy(source, target, len(source.tokens)):
            target.last_used, target.conversation, target.apart = last_used, conversation, apart
        self.clear(source)

    def name(self, slot: Slot, conversation: str | None) -> None:
        """Say whose a sequence is; what another one has of the same conversation is older."""
        for other in self.all:
            if conversation is not None and other.conversation == conversation:
                other.conversation = None
        slot.conversation = conversation

    def unread(self, job: Job) -> int:
        """Return how many of a prompt's tokens no sequence has, as it stands now."""
        reread = job.request.reread
        return len(job.tokens) - max(usable(job.tokens, slot, reread=reread) for slot in self.all)

    def touch(self, slot: Slot) -> None:
        """It is used now."""
        self._time += 1
        slot.last_used = self._time

    def cut(self, slot: Slot, n_tokens: int) -> None:
        """Keep the first tokens of a sequence; none when the rows cannot be removed without the others."""
        # where attention slides the library removes the end even if rows that the rest needs are gone
        exact = n_tokens >= self.context.removable_from(slot.index)
        if n_tokens and exact and self.context.remove(slot.index, n_tokens):
            del slot.tokens[n_tokens:]
        else:
            self.clear(slot)

    def clear(self, slot: Slot) -> None:
        """Forget what a sequence holds."""
        self.context.remove(slot.index)
        slot.tokens = []
        slot.removable_from = slot.rows = slot.evicted = 0
        slot.conversation, slot.budgets, slot.apart = None, (), False

    def _copy(self, source: Slot, target: Slot, n_tokens: int) -> int:
        end = -1 if n_tokens == len(source.tokens) else n_tokens
        self.clear(target)
        try:
            self.context.copy(source.index, target.index, end)
            target.tokens = source.tokens[:n_tokens]
            target.budgets = source.budgets
            self.measure(target)
        except Exception as error:
            self.clear(target)
            if not isinstance(error, ContextError):
                raise
            _logger.info("sequence %d is not copied: %s", source.index, error)
            return 0
        self.touch(source)
        return n_tokens

    def keep_apart(self, slot: Slot) -> None:
        """Copy a sequence as it is into one that is free, so that later prompts can begin with it."""
        if any(other.tokens == slot.tokens for other in self.all if other is not slot and not other.reading):
            return
        spare = [other for other in self.all if not other.busy and other is not slot]
        if spare and len(slot.tokens) >= LEAST_REUSE:
            target = min(reversed(spare), key=lambda other: oldest(other)[:2])  # the last: requests take the first
            target.apart = self._copy(slot, target, len(slot.tokens)) > 0
            self.touch(target)

    def set_budget(self, slot: Slot, rows: Sequence[int]) -> None:
        """Give a sequence the rows that its next selection leaves; no layer more than the context has for it."""
        most = self.context.settings.kv
        if not self.context.kv_active or most is None:
            return
        budgets = tuple(map(min, rows, most.rows))
        if budgets != slot.budgets:
            self.context.set_kv_budget(slot.index, budgets)
            slot.budgets = budgets

    def measure(self, slot: Slot) -> None:
        """Ask the library what a sequence holds."""
        context = self.context
        if context.kv_active:
            rows = context.kv_rows(slot.index)
            slot.rows = sum(rows)
            # layers with a sliding window let rows go that no token sees any more
            bounded = rows if context.settings.kv is None else context.settings.kv.of_bounded(rows)
            slot.evicted = len(slot.tokens) * len(bounded) - sum(bounded)
        else:
            slot.rows = len(slot.tokens) * context.model.n_layer
        slot.removable_from = context.removable_from(slot.index)
