"""The real engine: callers' threads hand in requests, one thread owns the llama context and serves them together."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ziggurat.runtime.engine import conversations, figures
from ziggurat.runtime.engine.admission import Job, Task
from ziggurat.runtime.engine.protocol import (
    Embeddings,
    EngineStats,
    Event,
    GenerationRequest,
    KeptRows,
    ModelInfo,
)
from ziggurat.runtime.engine.settings import EngineSettings
from ziggurat.runtime.engine.stream import EventStream
from ziggurat.runtime.engine.worker import Worker, start
from ziggurat.runtime.errors import EngineClosedError, EngineError, PromptTooLongError, UnsupportedError
from ziggurat.runtime.sampler import Sampler

__all__ = ["EngineSettings", "LlamaEngine"]


class LlamaEngine:
    """An ``Engine`` over one GGUF model. Nothing happens before ``load``.

    As many requests run together as the settings say; ``stream`` returns at once and the events arrive as they are
    made. Closing (or leaving the ``with`` block) ends what is running.
    """

    def __init__(self, path: str | os.PathLike[str], settings: EngineSettings | None = None) -> None:
        self._path = path
        self._settings = settings or EngineSettings()
        self._worker: Worker | None = None
        self._loading = threading.Lock()
        self._closed = False
        # Also at exit: a daemon thread inside the library must be gone before the library is.
        self._shutdown: Callable[[], object] = lambda: None

    def load(self, progress: Callable[[float], None] | None = None) -> ModelInfo:
        """Load the model and make the context; see ``Engine.load``. ``progress`` is called with 0.0 to 1.0."""
        with self._loading:
            if self._closed:
                raise EngineClosedError("the engine was closed")
            if self._worker is None:
                worker, thread = start(self._path, self._settings, progress)
                self._shutdown = weakref.finalize(self, _shut_down, worker, thread)
                self._worker = worker
            return self._worker.loaded.info

    def _ready(self) -> Worker:
        worker = self._worker
        if worker is None and not self._closed:
            raise EngineError("the engine has no model yet: call load() first")
        if worker is None or worker.inbox.closing:
            raise EngineClosedError("the engine was closed")
        return worker

    def stream(self, request: GenerationRequest) -> EventStream[Event]:
        """Queue a request; see ``Engine.stream``. EngineError before ``load``, EngineClosedError after ``close``."""
        submitted = time.perf_counter()
        worker = self._ready()
        loaded = worker.loaded
        if not loaded.info.generates_text:
            raise UnsupportedError(f"{loaded.info.path}: this model makes embeddings and does not generate text")
        tokens = loaded.prompts.encode(request)
        if len(tokens) > loaded.info.n_ctx:
            raise PromptTooLongError(len(tokens), loaded.info.n_ctx, loaded.info.n_ctx_train)
        # here and not in the engine's thread: what is wrong with it is the caller's, and others need not wait for it
        sampler = Sampler(request.sampling, loaded.model.vocab, loaded.info.n_ctx)
        shared = loaded.prompts.shared(request, tokens) if worker.shares else 0
        job = Job(request, tokens, sampler, submitted, shared)
        worker.inbox.put(job)
        return EventStream(job.channel, functools.partial(_cancel, worker, job))

    def cancel(self, request_id: str) -> bool:
        """End a request; see ``Engine.cancel``."""
        worker = self._worker
        job = worker.inbox.find(request_id) if worker is not None else None
        if worker is None or job is None:
            return False
        _cancel(worker, job)
        return True

    def embed(self, texts: Sequence[str | Sequence[int]], *, wanted: Callable[[], bool] = lambda: True) -> Embeddings:
        """Return embeddings; see ``Engine.embed``."""
        worker = self._ready()
        embedder = worker.loaded.embedder
        if embedder is None:
            raise UnsupportedError("this engine makes no embeddings: it was not asked to when it was loaded")
        tokens = [embedder.encode(text) if isinstance(text, str) else list(text) for text in texts]
        embedder.check(tokens)
        job = embedder.start(tokens)

        def step() -> bool:
            if not wanted():
                raise EngineError("the embeddings are wanted no more")
            return job.step()

        embeddings: Embeddings = _wait(worker, Task(job.result, step))
        return embeddings

    def encode(self, request: GenerationRequest) -> list[int]:
        """Return a prompt's tokens; see ``Engine.encode``."""
        return self._ready().loaded.prompts.encode(request)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return a text's tokens; see ``Engine.tokenize``."""
        vocab = self._ready().loaded.model.vocab
        return vocab.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return tokens' text; see ``Engine.detokenize``."""
        vocab = self._ready().loaded.model.vocab
        vocab.check(tokens)
        return b"".join(vocab.piece(token, special=True) for token in tokens).decode("utf-8", errors="replace")

    def save(self, conversation: str, path: str | os.PathLike[str]) -> int:
        """Write a conversation to a file; see ``Engine.save``."""
        tokens: int = self._call(lambda worker: conversations.save(worker.slots(), worker.loaded, conversation, path))
        return tokens

    def restore(self, conversation: str, path: str | os.PathLike[str]) -> int:
        """Take up a saved conversation; see ``Engine.restore``."""
        tokens: int = self._call(
            lambda worker: conversations.restore(worker.slots(), worker.loaded, conversation, path)
        )
        return tokens

    def kept(self, conversation: str) -> KeptRows:
        """Tell what a conversation's rows are of; see ``Engine.kept``."""
        rows: KeptRows = self._call(lambda worker: conversations.kept(worker.slots(), conversation))
        return rows

    def _call(self, function: Callable[[Worker], Any]) -> Any:
        """Run a function in the engine's thread, between its steps."""
        worker = self._ready()
        return _wait(worker, Task(functools.partial(function, worker)))

    def stats(self) -> EngineStats:
        """Return the counters; see ``Engine.stats``."""
        worker = self._worker
        return EngineStats() if worker is None else figures.engine_stats(worker)

    def close(self) -> None:
        """End all requests and free the model; see ``Engine.close``. Waits for the step that is running."""
        with self._loading:  # a load in another thread ends first
            self._closed = True
            self._shutdown()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _wait(worker: Worker, task: Task) -> Any:
    worker.inbox.run(task)
    return task.future.result()


def _cancel(worker: Worker, job: Job) -> None:
    job.cancelled = True
    worker.scheduler.interrupt(job)


def _shut_down(worker: Worker, thread: threading.Thread) -> None:
    worker.close()
    if thread is not threading.current_thread():  # the collector may run this in the engine's own thread
        thread.join()
