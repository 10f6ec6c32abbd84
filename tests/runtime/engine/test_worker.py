"""The engine's thread over the stand-in for the library: failures of the whole, tasks, and the end."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fake_library import Clock, FakeContext, FakeSampler, Fault
from ziggurat.runtime.engine.admission import Job, Task
from ziggurat.runtime.engine.contexts import Serving
from ziggurat.runtime.engine.figures import engine_stats
from ziggurat.runtime.engine.generation import KVFigures
from ziggurat.runtime.engine.protocol import FinishEvent, GenerationRequest
from ziggurat.runtime.engine.settings import EngineSettings
from ziggurat.runtime.engine.stream import EventStream
from ziggurat.runtime.engine.worker import Worker
from ziggurat.runtime.errors import ConversationError, EngineClosedError, EngineError


def make(*, one_shot: bool = False, **values: Any) -> tuple[Worker, FakeContext]:
    settings = EngineSettings(one_shot=one_shot, **({} if one_shot else {"parallel": 2}), **values)
    context: Any = FakeContext(Clock(), n_seq=settings.parallel + settings.cached)
    serving = Serving(context, context.new_batch(), KVFigures(1, 2, 3, (4, 4), True), lambda n: context.rows, 1, 2)
    loaded: Any = SimpleNamespace(
        info=SimpleNamespace(n_ctx=256, path="m.gguf", generates_text=True),
        contexts=SimpleNamespace(for_all=lambda: serving, for_prompt=lambda n: serving, policy=None),
        model=SimpleNamespace(recurrent=False, n_layer=2),
        planned=SimpleNamespace(context=5),
        embedder=None,
    )
    return Worker(loaded, settings), context


def submit(worker: Worker, name: str, prompt: tuple[int, ...], n: int | None = 4) -> EventStream[Any]:
    sampler: Any = FakeSampler()
    job = Job(GenerationRequest(tokens=prompt, max_tokens=n, id=name), list(prompt), sampler, 100.0)
    worker.inbox.put(job)
    return EventStream(job.channel, lambda: None)


def last_of(stream: EventStream[Any]) -> Any:
    return list(stream)[-1]


def test_what_fails_outside_of_any_request_ends_those_that_run_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = make()
    hit = iter((False, False, True))

    def broken(generations: Any) -> Any:
        if next(hit, False):
            raise RuntimeError("a bug")
        return original(generations)

    assert worker.scheduler.decoding is not None
    original = worker.scheduler.decoding.step
    monkeypatch.setattr(worker.scheduler.decoding, "step", broken)
    streams = [submit(worker, str(n), (1, 2, 3 + n), 9) for n in range(3)]
    thread = threading.Thread(target=worker.serve)
    with caplog.at_level(logging.CRITICAL):
        thread.start()
        results = []
        for stream in streams:
            try:
                results.append(last_of(stream))
            except EngineError as error:
                assert "RuntimeError: a bug" in str(error)
                results.append(None)
        worker.close()
        thread.join(30)
    assert None in results
    assert isinstance(results[2], FinishEvent)
    assert not thread.is_alive()


def test_tasks_are_done_between_steps_and_end_with_the_engine() -> None:
    worker, _ = make()
    seen: list[int] = []
    pieces = iter((False, False, True))
    task = Task(lambda: sum(seen), lambda: seen.append(len(worker.scheduler.running)) or next(pieces))
    stream = submit(worker, "a", (1, 2, 3), 30)
    thread = threading.Thread(target=worker.serve)
    worker.inbox.run(task)
    late = Task(lambda: 1, lambda: worker.inbox.close() or False)  # never done: the engine ends during it
    thread.start()
    assert task.future.result(30) <= 2
    assert len(seen) == 3
    list(stream)
    worker.inbox.run(late)
    with pytest.raises(EngineClosedError):
        late.future.result(30)
    thread.join(30)
    assert not thread.is_alive()


def test_counters_read_while_it_works_never_fail() -> None:
    worker, context = make(cached=1)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    streams = [submit(worker, str(n), tuple(range(1, 50)) + (n + 1,), 20) for n in range(40)]
    while any(not stream._channel._ended for stream in streams):
        stats = engine_stats(worker)
        assert 0 <= stats.running <= 2
        assert stats.prompt_progress is None or 0 <= stats.prompt_progress <= 1
        worker.scheduler.interrupt(streams and worker.inbox.find("39"))
    worker.close()
    thread.join(30)
    stats = engine_stats(worker)
    assert (stats.finished, stats.running, stats.queued, stats.loaded) == (40, 0, 0, False)
    assert not context.misuses


def test_one_shot_keeps_nothing() -> None:
    worker, context = make(one_shot=True)
    with pytest.raises(ConversationError, match="keeps no conversations"):
        worker.slots()
    worker.scheduler.interrupt(None)  # before there is a context
    streams = [submit(worker, str(n), (1, 2, 3, n + 1)) for n in range(3)]
    while worker.scheduler.tick():
        pass
    ends = [last_of(stream) for stream in streams]
    assert [end.stats.reused_tokens for end in ends] == [0, 0, 0]
    assert context.sequences[0].tokens == []


def test_a_context_that_cannot_be_made_is_one_requests_error() -> None:
    worker, _ = make(one_shot=True)
    fault = Fault(0, MemoryError())
    good = worker.scheduler._serving_for

    def serving_for(n_tokens: int) -> Serving:
        nonlocal fault
        error, fault = fault.error, Fault(0)
        if error is not None:
            raise error
        assert good is not None
        return good(n_tokens)

    worker.scheduler._serving_for = serving_for
    first, second = submit(worker, "a", (1, 2)), submit(worker, "b", (1, 2))
    while worker.inbox.waiting or worker.scheduler.running:
        worker.scheduler.tick()
    with pytest.raises(EngineError, match="MemoryError"):
        list(first)
    assert isinstance(last_of(second), FinishEvent)
