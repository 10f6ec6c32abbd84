"""One decoding step of all sequences that are past their prompts, with what speculation proposes for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from ziggurat.runtime.engine.contexts import Serving
from ziggurat.runtime.engine.drafting import Drafting
from ziggurat.runtime.engine.generation import Generation
from ziggurat.runtime.engine.rates import Rate, Typical
from ziggurat.runtime.engine.speculation import verified
from ziggurat.runtime.errors import DecodeAborted, EngineError, ZigguratError

_logger = logging.getLogger(__name__)


class Decoding:
    """Computes the steps of one context and hands out their tokens.

    A sequence takes part with its pending token and the tokens drafted after it. Its sampler chooses after each of them
    in turn, until it chooses another token than the draft: what is generated is what would have been without drafts,
    from the same seed too. The rows of the drafts that were not chosen are removed.
    """

    def __init__(
        self, serving: Serving, drafting: Drafting | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.rate = Rate()
        self.step_time = Typical()
        self._context, self._batch = serving.context, serving.batch
        self._drafting = drafting
        self._clock = clock

    def step(self, generations: Sequence[Generation]) -> dict[Generation, Exception]:
        """Decode the pending tokens and choose the next ones; return what failed and why. Events are pushed.

        When the library fails on sequences together each is tried alone, and only those that fail then are lost. After
        an abort nothing has happened, but for what is ``reason`` enough to look again.
        """
        drafts = self._drafts(generations)
        begun = self._clock()
        try:
            indices = self._compute(generations, drafts)
        except DecodeAborted:
            self._context.abort.clear()
            return self._restore(generations)
        except Exception as error:
            if len(generations) == 1:
                return {generations[0]: error}
            return self._one_by_one(generations)
        failed: dict[Generation, Exception] = {}
        n_before = sum(generation.n_generated for generation in generations)
        for generation, draft, index in zip(generations, drafts, indices, strict=True):
            try:
                self._take(generation, draft, index)
            except Exception as error:
                failed[generation] = error
        seconds = self._clock() - begun
        self.step_time.record(seconds)
        self.rate.record(sum(generation.n_generated for generation in generations) - n_before, seconds)
        if self._drafting is not None:
            self._drafting.computed(sum(map(len, drafts)) + len(generations), seconds)
        return failed

    def _drafts(self, generations: Sequence[Generation]) -> list[list[int]]:
        if self._drafting is None:
            return [[]] * len(generations)
        try:
            return self._drafting.draft(generations)
        except Exception:  # nobody depends on them
            _logger.warning("a step without drafts: they failed", exc_info=True)
            return [[] for _ in generations]

    def _compute(self, generations: Sequence[Generation], drafts: Sequence[Sequence[int]]) -> list[int]:
        """Decode; return where the logits after each sequence's pending token are."""
        batch = self._batch
        batch.clear()
        indices = []
        for generation, draft in zip(generations, drafts, strict=True):
            slot = generation.slot
            assert generation.pending is not None
            last = batch.add((generation.pending, *draft), len(slot.tokens), slot.index, output_last=True)
            indices.append(last - len(draft))
            if draft:
                batch.want(last - len(draft), last)
        self._context.decode(batch)
        return indices

    def _take(self, generation: Generation, draft: Sequence[int], index: int) -> None:
        slot = generation.slot
        n_rows = len(slot.tokens) + 1 + len(draft)
        pending = generation.pending
        assert pending is not None
        slot.tokens.append(pending)
        generation.decode_steps += 1
        n_accepted = 0
        for place, token in enumerate(verified(draft, lambda place: self._choose(generation, index + place))):
            if place < len(draft) and token == draft[place]:
                slot.tokens.append(token)
                n_accepted += 1
        generation.drafted += len(draft)
        generation.accepted += n_accepted
        if self._drafting is not None:
            self._drafting.judged(generation, len(draft), n_accepted)
        self._keep(generation, n_rows)

    def _choose(self, generation: Generation, index: int) -> int | None:
        """Choose a token and push it; None when it was the last, or none."""
        event = generation.choose(index)
        if event is None:
            return None
        generation.job.channel.push(event)
        return event.token if generation.reason is None else None

    def _keep(self, generation: Generation, n_rows: int) -> None:
        """Remove the rows beyond the tokens that the sequence has."""
        slot = generation.slot
        if n_rows > len(slot.tokens) and not self._context.remove(slot.index, len(slot.tokens)):
            raise EngineError("rows of drafted tokens cannot be removed; this is a bug in Ziggurat")

    def _restore(self, generations: Sequence[Generation]) -> dict[Generation, Exception]:
        """Bring the sequences of a step that failed to where they were; return those that cannot be."""
        lost: dict[Generation, Exception] = {}
        for generation in generations:
            slot = generation.slot
            n_rows = self._context.last_position(slot.index) + 1
            try:
                if n_rows < len(slot.tokens):
                    raise EngineError("rows were lost when a step failed")
                self._keep(generation, n_rows)
            except ZigguratError as error:
                lost[generation] = error
        return lost

    def _one_by_one(self, generations: Sequence[Generation]) -> dict[Generation, Exception]:
        failed = self._restore(generations)
        for generation in generations:
            if generation not in failed:
                try:
                    index = self._compute((generation,), ((),))[0]
                    self._take(generation, (), index)
                except DecodeAborted:
                    self._context.abort.clear()
                    failed |= self._restore((generation,))
                except Exception as error:
                    failed[generation] = error
        return failed
