"""The thread that owns the llama context, from loading the model to freeing it."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future

from ziggurat.runtime import device_sampling
from ziggurat.runtime.bindings import devices, supports_gpu_offload
from ziggurat.runtime.engine.admission import Inbox
from ziggurat.runtime.engine.drafters import make_drafting
from ziggurat.runtime.engine.loader import Loaded, load
from ziggurat.runtime.engine.places import Turns
from ziggurat.runtime.engine.scheduler import Scheduler
from ziggurat.runtime.engine.settings import EngineSettings
from ziggurat.runtime.engine.slots import Slots
from ziggurat.runtime.errors import ConversationError, EngineClosedError, EngineError

_logger = logging.getLogger(__name__)


def start(
    path: str | os.PathLike[str], settings: EngineSettings, progress: Callable[[float], None] | None
) -> tuple[Worker, threading.Thread]:
    """Load a model in a new thread, and leave it there serving.

    Raises what ``load`` raises; the thread is gone then.
    """
    stop = threading.Event()

    def proceed(fraction: float) -> bool:
        if progress is not None:
            progress(fraction)
        return not stop.is_set()

    ready: Future[Worker] = Future()
    make = functools.partial(load, path, settings, proceed)
    thread = threading.Thread(target=_run, args=(make, settings, ready), name="ziggurat-engine", daemon=True)
    thread.start()
    try:
        return ready.result(), thread
    except BaseException:  # Ctrl-C here, or the load's own error: the thread ends by itself either way
        stop.set()
        ready.add_done_callback(_close_unwanted)
        thread.join()
        raise


def _close_unwanted(ready: Future[Worker]) -> None:
    if not ready.exception():
        ready.result().close()


def _run(make: Callable[[], Loaded], settings: EngineSettings, ready: Future[Worker]) -> None:
    try:
        loaded = make()
    except BaseException as error:
        ready.set_exception(error)
        return
    try:
        try:
            worker = Worker(loaded, settings)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(worker)
        worker.serve()
    finally:
        loaded.model.close()


def _yields() -> bool:
    """Whether the threads that hand events on get no core before this one lets go of it: with a real-time policy."""
    policy = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    return policy is not None and policy in (os.SCHED_FIFO, os.SCHED_RR)


class Worker:
    """What the engine's thread does. Knows nothing of the engine, so that the engine can be let go of."""

    def __init__(self, loaded: Loaded, settings: EngineSettings) -> None:
        self.loaded = loaded
        self.inbox = Inbox(settings.parallel + settings.queue_limit, settings.parallel)
        self.one_shot = settings.one_shot
        turns = Turns(loaded.info.n_ctx, settings.parallel, settings.lanes, settings.gap)
        serving_for = loaded.contexts.for_prompt if settings.one_shot else None
        generates = loaded.info.generates_text
        self._drafting = make_drafting(loaded, settings) if generates else None
        on_device = device_sampling.worthwhile(
            n_gpu_layers=settings.gpu_layers,
            n_layer=loaded.model.n_layer,
            has_gpu=supports_gpu_offload() and any(device.kind == "gpu" for device in devices()),
            kv_budget=loaded.contexts.policy is not None,
            drafts=self._drafting is not None,
        )
        self.scheduler = Scheduler(
            self.inbox, turns, serving_for=serving_for, drafting=self._drafting, samples_on_device=on_device
        )
        if not settings.one_shot and generates:
            self.scheduler.use(loaded.contexts.for_all())

    @property
    def shares(self) -> bool:
        """Whether it is of use to know how much of a prompt others may begin with."""
        return not self.one_shot and self.scheduler.serving.context.kv_active

    def slots(self) -> Slots:
        """Return the sequences. Raises ConversationError when nothing stays in them."""
        if self.one_shot or not self.loaded.info.generates_text:
            raise ConversationError("this engine keeps no conversations: it is for single prompts, or for embeddings")
        return self.scheduler.slots

    def serve(self) -> None:
        """Work until the inbox closes; what is left then ends with EngineClosedError."""
        end: Exception = EngineClosedError("the engine was closed before this request ended")
        yields = _yields()
        try:
            while not self.inbox.closing:
                try:
                    if not self.scheduler.tick():
                        self.inbox.wait()
                    elif yields:
                        os.sched_yield()
                except Exception as error:  # outside any one request: those that come next can be served
                    _logger.exception("the engine failed")
                    self.scheduler.give_up(error)
            self.scheduler.close(end)
        except Exception as error:
            end = EngineError(f"the engine failed: {type(error).__name__}: {error}")
        finally:
            self.inbox.abandon(end)
            if self._drafting is not None:
                self._drafting.close()

    def close(self) -> None:
        """Have the thread end, and at once. From any thread."""
        self.inbox.close()
        self.scheduler.interrupt(None)
        if self.loaded.embedder is not None:
            self.loaded.embedder.context.abort.set()
