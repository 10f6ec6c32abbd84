"""The real engine: one thread owns the llama context and serves requests in the order they came."""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from ziggurat.runtime.bindings import Context
from ziggurat.runtime.engine.contexts import Serving
from ziggurat.runtime.engine.generation import Generation
from ziggurat.runtime.engine.loader import EngineSettings, Loaded, load
from ziggurat.runtime.engine.protocol import EngineStats, Event, FinishEvent, GenerationRequest, ModelInfo
from ziggurat.runtime.engine.stream import Channel, EventStream
from ziggurat.runtime.errors import (
    DecodeAborted,
    EngineClosedError,
    EngineError,
    PromptTooLongError,
    ZigguratError,
)
from ziggurat.runtime.sampler import Sampler

__all__ = ["EngineSettings", "LlamaEngine"]


@dataclass(eq=False)
class _Job:
    """A queued request: its tokens, where its events go, and the part of its prompt that is read."""

    request: GenerationRequest
    tokens: list[int]
    channel: Channel[Event]
    sampler: Sampler
    submitted: float
    cancelled: bool = False
    prompt_progress: float = 0.0


@dataclass
class _State:
    """What the callers' threads and the engine's share; everything under ``lock``.

    The lock is reentrant: a stream that is garbage-collected cancels its request, in whatever thread that happens.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    jobs: dict[str, _Job] = field(default_factory=dict)
    current: _Job | None = None
    context: Context | None = None
    closing: bool = False
    stats: EngineStats = field(default_factory=EngineStats)


class LlamaEngine:
    """An ``Engine`` over one GGUF model. Nothing happens before ``load``.

    Requests run one after the other; ``stream`` returns at once and the events arrive as they are made. Closing (or
    leaving the ``with`` block) ends what is running.
    """

    def __init__(self, path: str | os.PathLike[str], settings: EngineSettings | None = None) -> None:
        self._path = path
        self._settings = settings or EngineSettings()
        self._state = _State()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loading = threading.Lock()
        self._loaded: Loaded | None = None
        self._thread: threading.Thread | None = None
        # Also at exit: a daemon thread inside the library must be gone before the library is.
        self._shutdown: Callable[[], object] = lambda: None

    def load(self, progress: Callable[[float], None] | None = None) -> ModelInfo:
        """Load the model and make the context; see ``Engine.load``. ``progress`` is called with 0.0 to 1.0."""
        with self._loading:
            if self._state.closing:
                raise EngineClosedError("the engine was closed")
            if self._loaded is None:
                self._loaded = self._start(progress)
            return self._loaded.info

    def _start(self, progress: Callable[[float], None] | None) -> Loaded:
        stop = threading.Event()

        def proceed(fraction: float) -> bool:
            if progress is not None:
                progress(fraction)
            return not stop.is_set()

        ready: Future[Loaded] = Future()
        make = functools.partial(load, self._path, self._settings, proceed)
        worker = _Worker(self._state, self._queue)
        self._thread = threading.Thread(target=worker.run, args=(make, ready), name="ziggurat-engine", daemon=True)
        self._thread.start()
        try:
            loaded = ready.result()
        except BaseException:  # Ctrl-C here, or the load's own error: the thread ends by itself either way
            stop.set()
            self._queue.put(None)
            self._thread.join()
            self._state, self._queue = _State(), queue.SimpleQueue()  # so that a later load starts from nothing
            raise
        self._shutdown = weakref.finalize(self, _shut_down, self._state, self._queue, self._thread)
        return loaded

    def stream(self, request: GenerationRequest) -> EventStream[Event]:
        """Queue a request; see ``Engine.stream``. EngineError before ``load``, EngineClosedError after ``close``."""
        submitted = time.perf_counter()
        state, loaded = self._state, self._loaded
        if loaded is None and not state.closing:
            raise EngineError("the engine has no model yet: call load() first")
        if loaded is None or state.closing:
            raise EngineClosedError("the engine was closed")
        tokens = loaded.prompts.encode(request)
        if len(tokens) > loaded.info.n_ctx:
            raise PromptTooLongError(len(tokens), loaded.info.n_ctx, loaded.info.n_ctx_train)
        # here and not in the engine's thread: what is wrong with it is the caller's, and others need not wait for it
        sampler = Sampler(request.sampling, loaded.model.vocab, loaded.info.n_ctx)
        job = _Job(request, tokens, Channel(), sampler, submitted)
        with state.lock:
            if state.closing:
                raise EngineClosedError("the engine was closed")
            if request.id in state.jobs:
                raise EngineError(f"a request with the id {request.id} is already running")
            state.jobs[request.id] = job
            self._queue.put(job)
        return EventStream(job.channel, functools.partial(_cancel, state, job))

    def cancel(self, request_id: str) -> bool:
        """End a request; see ``Engine.cancel``."""
        with self._state.lock:
            job = self._state.jobs.get(request_id)
            if job is not None:
                _cancel(self._state, job)
            return job is not None

    def stats(self) -> EngineStats:
        """Return the counters; see ``Engine.stats``."""
        state = self._state
        with state.lock:
            current = state.current
            running = current is not None
            return replace(
                state.stats,
                loaded=self._loaded is not None and not state.closing,
                running=int(running),
                queued=len(state.jobs) - running,
                prompt_progress=current.prompt_progress if current is not None else None,
                kv_bytes=self._loaded.info.kv_bytes if self._loaded else 0,
            )

    def close(self) -> None:
        """End all requests and free the model; see ``Engine.close``. Waits for the step that is running."""
        with self._loading:  # a load in another thread ends first
            self._state.closing = True
            self._shutdown()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _cancel(state: _State, job: _Job) -> None:
    with state.lock:
        job.cancelled = True
        if state.current is job and state.context is not None:
            state.context.abort.set()


def _shut_down(state: _State, requests: queue.SimpleQueue[_Job | None], thread: threading.Thread) -> None:
    with state.lock:
        state.closing = True
        if state.context is not None:
            state.context.abort.set()
    requests.put(None)
    if thread is not threading.current_thread():  # the collector may run this in the engine's own thread
        thread.join()


class _Worker:
    """What runs in the engine's thread. Knows the state, never the engine, so that the engine can be let go of."""

    def __init__(self, state: _State, requests: queue.SimpleQueue[_Job | None]) -> None:
        self._state = state
        self._queue = requests

    def run(self, make: Callable[[], Loaded], ready: Future[Loaded]) -> None:
        try:
            loaded = make()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(loaded)
        try:
            self._serve(loaded)
        finally:
            with self._state.lock:
                self._state.closing, self._state.context = True, None
                jobs = list(self._state.jobs.values())
                self._state.jobs.clear()
            for job in jobs:
                job.channel.end(EngineClosedError("the engine was closed before this request ended"))
            loaded.model.close()

    def _serve(self, loaded: Loaded) -> None:
        while (job := self._queue.get()) is not None:
            with self._state.lock:
                if self._state.closing:
                    return
                self._state.current = job
            error: BaseException | None = None
            done: FinishEvent | None = None
            try:
                done = self._generate(job, self._prepare(job, loaded))
            except ZigguratError as caught:
                error = caught
            except Exception as caught:  # a fault of ours must not take the other requests with it
                error = EngineError(f"the engine failed on this request: {type(caught).__name__}: {caught}")
                error.__cause__ = caught
            self._end(job, done, error)

    def _prepare(self, job: _Job, loaded: Loaded) -> Serving:
        """Return the context that the request's prompt needs, ready to be aborted by other threads."""
        serving = loaded.contexts.for_prompt(len(job.tokens))
        with self._state.lock:
            self._state.context = serving.context
            serving.context.abort.clear()
        return serving

    def _generate(self, job: _Job, serving: Serving) -> FinishEvent | None:
        """Run one request to its end; None when the engine closes first."""
        context = serving.context
        generation = Generation(
            job.request, job.tokens, context, kv=serving.kv, submitted=job.submitted, sampler=job.sampler
        )
        try:
            while generation.reason is None:
                if self._state.closing:
                    return None
                if job.cancelled:
                    generation.cancel()
                    break
                try:
                    event = generation.step(serving.batch)
                except DecodeAborted:
                    continue  # closing or cancelled: the checks above tell which
                job.prompt_progress = generation.prompt_progress
                if event is not None:
                    job.channel.push(event)
            rest = generation.finish()
            assert generation.reason is not None
            return FinishEvent(rest, generation.reason, generation.stats())
        finally:
            generation.finish()
            context.clear()

    def _end(self, job: _Job, done: FinishEvent | None, error: BaseException | None) -> None:
        state = self._state
        with state.lock:
            state.current = None
            if done is None and error is None:
                return  # closing: run() ends what is left
            state.jobs.pop(job.request.id, None)
            old = state.stats
            state.stats = replace(
                old,
                finished=old.finished + int(done is not None and done.reason != "cancelled"),
                cancelled=old.cancelled + int(done is not None and done.reason == "cancelled"),
                failed=old.failed + int(error is not None),
                prompt_tokens=old.prompt_tokens + (done.stats.prompt_tokens if done else 0),
                generated_tokens=old.generated_tokens + (done.stats.generated_tokens if done else 0),
            )
        if done is not None:
            job.channel.push(done)
        job.channel.end(error)
