"""Who may begin: the places among the requests that run, and among the prompts that are read."""

from __future__ import annotations

from dataclasses import dataclass

from ziggurat.runtime.engine.admission import Job
from ziggurat.runtime.engine.contexts import Serving
from ziggurat.runtime.engine.generation import Generation
from ziggurat.runtime.engine.reading import Reading
from ziggurat.runtime.engine.reuse import LEAST_REUSE, common_prefix, worth_waiting
from ziggurat.runtime.engine.slots import Slots


@dataclass(frozen=True)
class Turns:
    """How requests share a context of ``n_ctx`` tokens each.

    ``lanes`` prompts are read at a time, besides those that are read in one piece.
    """

    n_ctx: int
    parallel: int
    lanes: int
    gap: float


class Places:
    """The places of one context. Nothing is changed here."""

    def __init__(self, turns: Turns, serving: Serving, slots: Slots, reading: Reading) -> None:
        self._turns, self._serving, self._slots, self._reading = turns, serving, slots, reading

    def free(self, job: Job) -> bool:
        """Whether a prompt may begin to be read, once there is a sequence for it.

        Those that are read in one piece may at once. Of the lanes for the rest the last is only for short ones. And
        what is being read already is not read beside that once more.
        """
        unread = self._slots.unread(job)
        n_held = len(job.tokens) - unread
        if self._is_being_read(job, n_held):
            return False
        if not self.shares(job.shared, n_held) and self._reading.in_one_piece(n_held, unread):
            return True
        short = self._serving.context.n_ubatch
        lanes, reading = self._turns.lanes, [each for each in self._reading.lanes if each.takes_lane]
        n_long = sum(each.n_unread > short for each in reading)
        return len(reading) < lanes and not (n_long >= lanes - 1 > 0 and unread > short)

    def _is_being_read(self, job: Job, n_held: int) -> bool:
        """Whether a prompt is the same as one that is being read, or begins so much alike that it had better wait."""
        context, n_tokens = self._serving.context, len(job.tokens)
        for read in self._reading.lanes:
            other = read.job.tokens
            if serves(read, job):
                return True
            if context.model.recurrent or (context.kv_active and not self._serving.keeps_all(len(other))):
                continue  # what the two have in common cannot be had from it
            saved = min(common_prefix(job.tokens, other), n_tokens - 1) - n_held
            if worth_waiting(saved, n_tokens - n_held, round((1 - read.prompt_progress) * read.n_unread)):
                return True
        return False

    def shares(self, n_tokens: int, reused: int) -> bool:
        """Whether a prompt's beginning is worth a sequence of its own, from which later prompts begin.

        Only where rows are evicted: what keeps all of them can begin another prompt anyway. And only when every layer
        has room for it as a whole.
        """
        context = self._serving.context
        kv = context.settings.kv
        if kv is None or not context.kv_active or n_tokens - reused < LEAST_REUSE:
            return False
        return len(self._slots.all) > self._turns.parallel and n_tokens <= min(kv.bounded)


def serves(read: Generation, job: Job) -> bool:
    """Whether a request goes on from the prompt that is read for another one: the same, and read anew if it has to."""
    return read.job.tokens == job.tokens and (not job.request.reread or read.n_unread == len(job.tokens))
