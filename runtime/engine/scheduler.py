"""What the context computes next: who gets in, which prompt is read on, and one decoding step for all others.

A tick is at most one of each. While some decode, prompts are read only for ``gap`` - 1 times as long as a decoding step
takes, but at least one piece: the time between two tokens of a sequence is then at most ``gap`` undisturbed ones and
one piece of reading. Prompts that are read at the same time take turns. Those that are read in one piece are read with
as many others as go into it; of the places for the rest the last is only for short ones. So a short prompt never waits
for a long one to end.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable

from ziggurat.runtime.engine.admission import Inbox, Job
from ziggurat.runtime.engine.contexts import Serving
from ziggurat.runtime.engine.counts import Counts, presentable
from ziggurat.runtime.engine.decoding import Decoding
from ziggurat.runtime.engine.drafting import Drafting
from ziggurat.runtime.engine.generation import Generation, not_begun
from ziggurat.runtime.engine.places import Places, Turns, serves
from ziggurat.runtime.engine.protocol import FinishEvent
from ziggurat.runtime.engine.reading import Reading
from ziggurat.runtime.engine.slots import Slot, Slots
from ziggurat.runtime.errors import RequestTimeoutError

_logger = logging.getLogger(__name__)

# how many of those that wait are looked at for a short one
_LOOK_AHEAD = 8


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
        self.places: Places
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
                serving,
                self.slots,
                self.counts,
                samples_on_device=self._samples_on_device,
                clock=self._clock,
                fork=self._fork,
            )
            self.places = Places(self._turns, serving, self.slots, self.reading)
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
        for job in waiting:
            if len(self.running) >= self._turns.parallel:
                return
            if not self.running or self.places.free(job):
                self._inbox.remove(job)
                self._begin(job)

    def _fork(self, read: Generation) -> list[Generation]:
        """Begin the requests that wait with a prompt that was just read, on copies of its sequence."""
        forks: list[Generation] = []
        with self._inbox.lock:
            alike = [job for job in self._inbox.waiting if serves(read, job)]
        for job in alike:
            slot = self._copy(read.slot) if len(self.running) < self._turns.parallel else None
            if slot is None:
                break  # they are read later, then
            self._inbox.remove(job)
            try:
                fork = self._generation(job, slot, len(job.tokens))
            except Exception as error:
                self._could_not_begin(job, slot, error)
                continue
            fork.prompt_copied(read)
            self.slots.name(slot, job.request.conversation)
            self._occupy(slot, fork)
            forks.append(fork)
        return forks

    def _copy(self, source: Slot) -> Slot | None:
        try:
            return self.slots.fork(source)
        except Exception:  # of neither request
            _logger.warning("a sequence could not be copied", exc_info=True)
            return None

    def _begin(self, job: Job) -> None:
        slot = None
        try:
            if self._serving_for is not None:
                self.use(self._serving_for(len(job.tokens)))
            slot, reused = self.slots.prepare(job)
            generation = self._generation(job, slot, reused)
            shared = job.shared if self.places.shares(job.shared, reused) else reused
            generation.parts = [part for part in (job.tokens[reused:shared], job.tokens[shared:]) if part]
            generation.takes_lane = shared > reused or not self.reading.in_one_piece(reused, len(job.tokens) - reused)
        except Exception as error:
            self._could_not_begin(job, slot, error)
            return
        self._occupy(slot, generation)
        self.reading.lanes.append(generation)

    def _generation(self, job: Job, slot: Slot, reused: int) -> Generation:
        serving = self.serving
        return Generation(job, slot, reused, context=serving.context, kv=serving.kv, clock=self._clock)

    def _occupy(self, slot: Slot, generation: Generation) -> None:
        slot.generation = generation
        self.running.append(generation)

    def _could_not_begin(self, job: Job, slot: Slot | None, error: Exception) -> None:
        _logger.debug("a request could not begin", exc_info=error)
        if slot is not None:
            self.slots.clear(slot)
        self._refuse(job, error)

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
