"""What waits for the engine's thread: requests, in the order they came and no more than it can get to, and tasks."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ziggurat.runtime.engine.protocol import Event, GenerationRequest
from ziggurat.runtime.engine.stream import Channel
from ziggurat.runtime.errors import DecodeAborted, EngineClosedError, EngineError, QueueFullError
from ziggurat.runtime.sampler import Sampler

# seconds that an idle engine waits for one more request, and for all that come with the first
_NEXT_COMPANION, _LAST_COMPANION = 0.003, 0.03
# after so many that came alone it waits for none
_ALONE = 8


@dataclass(eq=False)
class Job:
    """A request that was taken: its tokens, its sampler, and where its events go. Times are the engine's clock's.

    Of the tokens the first ``shared`` are likely to begin other prompts as well: a system prompt.
    """

    request: GenerationRequest
    tokens: list[int]
    sampler: Sampler
    submitted: float
    shared: int = 0
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.channel: Channel[Event] = Channel()
        timeout = self.request.timeout_s
        self.deadline = None if timeout is None else self.submitted + timeout


class Task:
    """Work other than a request, done in the engine's thread between its steps.

    ``step`` is called until it returns True, a piece of the work each time; then ``future`` gets what ``result``
    returns, or what either raised.
    """

    def __init__(self, result: Callable[[], Any], step: Callable[[], bool] = lambda: True) -> None:
        self.future: Future[Any] = Future()
        self._result, self._step = result, step

    def advance(self) -> bool:
        """Do a piece; True when it was the last."""
        if self.future.done():
            return True
        try:
            if not self._step():
                return False
            self.future.set_result(self._result())
        except DecodeAborted:
            return False
        except BaseException as error:
            self.future.set_exception(error)
        return True

    def abandon(self, error: BaseException) -> None:
        """The engine ends before the task does."""
        if not self.future.done():
            self.future.set_exception(error)


class Inbox:
    """Shared by the callers' threads and the engine's.

    ``capacity`` requests may be there at a time, running ones included. The lock is reentrant: a stream that is
    garbage-collected cancels its request, in whatever thread that happens.
    """

    def __init__(self, capacity: int, n_running: int) -> None:
        self.lock = threading.RLock()
        self.waiting: deque[Job] = deque()
        self.tasks: deque[Task] = deque()
        self.closing = False
        self.refused = 0
        self.request_seconds = 1.0  # how long requests ran lately
        self._capacity, self._n_running = capacity, n_running
        self._jobs: dict[str, Job] = {}
        self._most = 0  # of them at a time, since the engine was last idle
        self._n_alone = _ALONE  # times that it was idle since there were several
        self._work = threading.Condition(self.lock)

    @property
    def limit(self) -> int:
        """Requests that may wait while as many run as can."""
        return self._capacity - self._n_running

    def put(self, job: Job) -> None:
        """Take a request, or raise EngineClosedError, QueueFullError, and EngineError for an id that is in use."""
        with self.lock:
            if self.closing:
                raise EngineClosedError("the engine was closed")
            if job.request.id in self._jobs:
                raise EngineError(f"a request with the id {job.request.id} is already running")
            if len(self._jobs) >= self._capacity:
                self.refused += 1
                raise QueueFullError(self.limit, self.request_seconds * (1 + self.limit) / self._n_running)
            self._jobs[job.request.id] = job
            self._most = max(self._most, len(self._jobs))
            self.waiting.append(job)
            self._work.notify()

    def run(self, task: Task) -> None:
        """Have a task done in the engine's thread. Raises EngineClosedError."""
        with self.lock:
            if self.closing:
                raise EngineClosedError("the engine was closed")
            self.tasks.append(task)
            self._work.notify()

    def find(self, request_id: str) -> Job | None:
        """Return a request that waits or runs."""
        with self.lock:
            return self._jobs.get(request_id)

    def remove(self, job: Job) -> None:
        """A request has ended, or is about to begin: it waits no more; see ``end``."""
        with self.lock:
            self.waiting.remove(job)

    def end(self, job: Job, seconds: float | None = None) -> None:
        """Forget a request that has ended; ``seconds`` is how long it ran, if it did."""
        with self.lock:
            if self._jobs.get(job.request.id) is job:  # another one may have its id by now
                del self._jobs[job.request.id]
            if seconds is not None:
                self.request_seconds += 0.2 * (seconds - self.request_seconds)

    def wait(self) -> None:
        """Sleep until there is something to do.

        When it is a request, and lately there were several at a time, look for a moment whether others come with it, as
        they do from clients that waited for the same step: what is read and decoded together from the beginning takes
        less time for all of them.
        """
        with self.lock:
            self._n_alone = self._n_alone + 1 if self._most < 2 else 0
            alone, self._most = self._n_alone >= _ALONE, 0
            while not (self.waiting or self.tasks or self.closing):
                self._work.wait()
            until = time.monotonic() + _LAST_COMPANION
            count = len(self.waiting) if alone else 0
            while count < len(self.waiting) < self._n_running and not self.tasks and not self.closing:
                count = len(self.waiting)
                if time.monotonic() < until:
                    self._work.wait(_NEXT_COMPANION)

    def close(self) -> None:
        """Take nothing more."""
        with self.lock:
            self.closing = True
            self._work.notify()

    def abandon(self, error: BaseException) -> None:
        """End everything that is left with an error."""
        with self.lock:
            self.closing = True
            jobs, tasks = list(self._jobs.values()), list(self.tasks)
            self._jobs.clear()
            self.waiting.clear()
            self.tasks.clear()
        for job in jobs:
            job.sampler.close()
            job.channel.end(error)
        for task in tasks:
            task.abandon(error)
