"""What the context computes next: who gets in, which prompt is read on, and one decoding step for all others.

A tick is at most one of each. While some decode, prompts are read only for ``gap`` - 1 times as long as a decoding step
takes, but at least one piece: the time between two tokens of a sequence is then at most ``gap`` undisturbed ones and
one piece of reading. Prompts that are read at the same time take turns, and the last place among them is only for
short ones, which so never wait for a long one to end.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from ziggurat.runtime.engine.admission import Inbox, Job
from ziggurat.runtime.engine.contexts import Serving
from ziggurat.runtime.engine.counts import Counts, presentable
from ziggurat.runtime.engine.decoding import Decoding
from ziggurat.runtime.engine.drafting import Drafting
from ziggurat.runtime.engine.generation import Generation, not_begun
from ziggurat.runtime.engine.protocol import FinishEvent
from ziggurat.runtime.engine.reading import Reading
from ziggurat.runtime.engine.reuse import LEAST_FORK
from ziggurat.runtime.engine.slots import Slots
from ziggurat.runtime.errors import RequestTimeoutError

_logger = logging.getLogger(__name__)

# how many of those that wait are looked at for a short one
_LOOK_AHEAD = 8


@dataclass(frozen=True)
class Turns:
    """How requests share a context of ``n_ctx`` tokens each; ``lanes`` prompts are read at a time."""

    n_ctx: int
    parallel: int
    lanes: int
    gap: float


class Scheduler:
    """Serves the requests of an inbox with one context; ``tick`` is called by the thread that owns it.

    The context is given to ``use``. With ``serving_for`` it is that which each prompt's length asks for, and nothing of
    it is used again: that is for one request at a time. ``samples_on_device``: see ``device_sampling.worthwhile``.
    """

    def __init__(
        self,
        inbox: Inbox,
        turns: Turns,
        *,
        serving_for: Callable[[int], Serving] | None = None,
        drafting: Drafting | None = None,
        samples_on_device: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.counts = Counts()
        self.running: list[Generation] = []
        self.ready = False  # it has a context, and what follows
        self.serving: Serving
        self.slots: Slots
        self.decoding: Decoding
        self.reading: Reading
        self._inbox, self._turns, self._serving_for, self._clock = inbox, turns, serving_for, clock
        self._drafting = drafting
        self._samples_on_device = samples_on_device

    def use(self, serving: Serving) -> None:
        """Go on with this context; nothing runs on the one before."""
        if not self.ready or serving is not self.serving:
            self.serving = serving
            self.slots = Slots(serving.context)
            self.decoding = Decoding(serving, self._drafting, self._clock)
            self.reading = Reading(
                serving, self.slots, self.counts, samples_on_device=self._samples_on_device, clock=self._clock
            )
            self.ready = True

    def tick(self) -> bool:
        """Do the next piece of everything; False when there was nothing to do."""
        worked = self._run_task()
        self._drop()
        self._admit()
        if not self.ready:
            return worked
        worked |= self._read()
        return self._decode() or worked

    def interrupt(self, job: Job | None) -> None:
        """From any thread: end the computation at once if it is for this request alone; None: whatever it is for."""
        running = list(self.running)  # the engine's thread changes it
        if self.ready and (job is None or (len(running) == 1 and running[0].job is job)):
            self.serving.context.abort.set()

    def give_up(self, error: Exception) -> None:
        """End all that runs: something failed that is of no single request."""
        for generation in list(self.running):
            self._end(generation, error)

    def close(self, error: Exception) -> None:
        """End all that runs or waits."""
        self.give_up(error)
        for job in list(self._inbox.waiting):
            self._inbox.remove(job)
            self._refuse(job, error)

    # requests

    def _drop(self) -> None:
        """End what was cancelled or has run out of time."""
        now = self._clock()
        if self._inbox.waiting:
            with self._inbox.lock:
                gone = [job for job in self._inbox.waiting if job.cancelled or _late(job, now)]
                for job in gone:
                    self._inbox.remove(job)
            for job in gone:
                self._refuse(job, None if job.cancelled else _timeout(job, "waited"))
        for generation in list(self.running):
            if generation.job.cancelled:
                generation.reason = "cancelled"
                self.serving.context.abort.clear()
                self._end(generation)
            elif _late(generation.job, now):
                self._end(generation, _timeout(generation.job, "ran"))

    def _refuse(self, job: Job, error: Exception | None) -> None:
        """End a request that has no sequence yet."""
        job.sampler.close()
        stats = not_begun(job, self._turns.n_ctx, self._clock())
        self._inbox.end(job)
        self._report(job, FinishEvent("", "cancelled", stats), error)

    def _admit(self) -> None:
        if not self._inbox.waiting:
            return
        with self._inbox.lock:
            waiting = list(itertools.islice(self._inbox.waiting, _LOOK_AHEAD))
        turns = self._turns
        for job in waiting:
            if len(self.running) >= turns.parallel or self._n_reading() >= turns.lanes:
                return
            n_long = sum(generation.n_unread > self._short for generation in self.reading.lanes) if self.ready else 0
            if n_long >= turns.lanes - 1 > 0 and self.slots.unread(job) > self._short:
                continue
            self._inbox.remove(job)
            self._begin(job)

    def _n_reading(self) -> int:
        return len(self.reading.lanes) if self.ready else 0

    @property
    def _short(self) -> int:
        """Tokens of a prompt that are read in one piece."""
        return self.serving.context.n_ubatch

    def _begin(self, job: Job) -> None:
        slot = None
        try:
            if self._serving_for is not None:
                self.use(self._serving_for(len(job.tokens)))
            slot, reused = self.slots.prepare(job)
            generation = Generation(
                job, slot, reused, context=self.serving.context, kv=self.serving.kv, clock=self._clock
            )
            shared = job.shared if self._shares(job.shared, reused) else reused
            generation.parts = [part for part in (job.tokens[reused:shared], job.tokens[shared:]) if part]
        except Exception as error:
            _logger.debug("a request could not begin", exc_info=True)
            if slot is not None:
                self.slots.clear(slot)
            self._refuse(job, error)
            return
        slot.generation = generation
        self.running.append(generation)
        self.reading.lanes.append(generation)

    def _shares(self, n_tokens: int, reused: int) -> bool:
        """Whether a prompt's beginning is worth a sequence of its own, from which later prompts begin.

        Only where rows are evicted: what keeps all of them can begin another prompt anyway. And only when every layer
        has room for it as a whole.
        """
        kv = self.serving.context.settings.kv
        if kv is None or not self.serving.context.kv_active or n_tokens - reused < LEAST_FORK:
            return False
        return len(self.slots.all) > self._turns.parallel and n_tokens <= min(kv.bounded)

    def _end(self, generation: Generation, error: Exception | None = None) -> None:
        """Take a request off its sequence, which keeps what it holds unless something went wrong."""
        slot = generation.slot
        self.running.remove(generation)
        self.reading.discard(generation)
        slot.generation = None
        # the rows of one that was too slow are as right as any
        keeps = self._serving_for is None and (error is None or isinstance(error, RequestTimeoutError))
        try:
            if self._drafting is not None:
                self._drafting.forget(generation)
            if generation.reader is not None:
                generation.reader.cancel()
                self.slots.cut(slot, len(slot.tokens))
            self.slots.measure(slot)
        except Exception as fault:
            error, keeps = error or fault, False
        event = FinishEvent(generation.finish(), generation.reason or "cancelled", generation.stats())
        if not keeps:
            self.slots.clear(slot)
        self._inbox.end(generation.job, self._clock() - generation.started)
        self._report(generation.job, event, error)

    def _report(self, job: Job, event: FinishEvent, error: Exception | None) -> None:
        self.counts.add(event, failed=error is not None)
        if error is None:
            job.channel.push(event)
        job.channel.end(None if error is None else presentable(error))

    # work

    def _run_task(self) -> bool:
        if not self._inbox.tasks:
            return False
        task = self._inbox.tasks[0]
        if task.advance():
            self._inbox.tasks.popleft()
        return True

    def _read(self) -> bool:
        if not self.reading.lanes:
            return False
        waits = any(not generation.reading for generation in self.running)
        patience = (self._turns.gap - 1) * self.decoding.step_time.seconds if waits else 0.0
        for generation, error in self.reading.read(patience, lambda: not self._inbox.closing):
            self._end(generation, error)
        return True

    def _decode(self) -> bool:
        generations = [generation for generation in self.running if not generation.reading]
        # the library computes together only those that stand in the order of their sequences
        generations.sort(key=lambda generation: generation.slot.index)
        if not generations or self._inbox.closing:
            return False
        failed = self.decoding.step(generations)
        for generation in generations:
            error = failed.get(generation)
            if error is not None or generation.reason is not None:
                self._end(generation, error)
        return True


def _late(job: Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline


def _timeout(job: Job, did: str) -> RequestTimeoutError:
    return RequestTimeoutError(f"the request {did} longer than the {job.request.timeout_s:g} s that it had")
