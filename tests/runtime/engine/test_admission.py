from __future__ import annotations

import threading
from typing import Any

import pytest

from helpers.fake_library import FakeSampler
from ziggurat.runtime.engine import admission
from ziggurat.runtime.engine.admission import Inbox, Job, Task
from ziggurat.runtime.engine.protocol import GenerationRequest
from ziggurat.runtime.errors import EngineClosedError, EngineError, QueueFullError


def job(name: str = "a", **values: Any) -> Job:
    sampler: Any = FakeSampler()
    return Job(GenerationRequest(tokens=(1,), id=name, **values), [1], sampler, 10.0)


def test_requests_wait_in_the_order_they_came() -> None:
    inbox = Inbox(3, 1)
    jobs = [job(name) for name in "abc"]
    for each in jobs:
        inbox.put(each)
    assert list(inbox.waiting) == jobs
    assert inbox.find("b") is jobs[1]
    assert inbox.find("z") is None


def test_no_more_than_there_is_room_for_running_ones_included() -> None:
    inbox = Inbox(3, 2)
    jobs = [job(name) for name in "abc"]
    for each in jobs:
        inbox.put(each)
    inbox.remove(jobs[0])  # runs now, and still counts
    with pytest.raises(QueueFullError, match="1 requests are waiting") as refused:
        inbox.put(job("d"))
    assert refused.value.limit == inbox.limit == 1
    assert refused.value.retry_after_s == 1.0
    assert inbox.refused == 1
    inbox.end(jobs[0], 6.0)
    assert inbox.request_seconds == 2.0
    inbox.put(job("d"))


def test_an_idle_engine_begins_with_the_requests_that_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than can run; or those that came, when none does for a while."""
    monkeypatch.setattr(admission, "_NEXT_COMPANION", 60.0)
    monkeypatch.setattr(admission, "_LAST_COMPANION", 60.0)
    inbox = Inbox(9, 3)
    inbox.put(job("0"))
    inbox.wait()  # for no other: none came beside one yet
    inbox.put(job("1"))
    for first in list(inbox.waiting):
        inbox.remove(first)
        inbox.end(first)
    threads = [threading.Timer(0.01 * place, inbox.put, [job(name)]) for place, name in enumerate("abc")]
    for thread in threads:
        thread.start()
    inbox.wait()
    assert len(inbox.waiting) == 3
    inbox.remove(inbox.waiting[0])
    monkeypatch.setattr(admission, "_NEXT_COMPANION", 0.001)
    inbox.wait()
    assert len(inbox.waiting) == 2


def test_an_id_is_one_requests_until_it_has_ended() -> None:
    inbox = Inbox(3, 1)
    first, second = job(), job()
    inbox.put(first)
    with pytest.raises(EngineError, match="id a is already running"):
        inbox.put(second)
    inbox.remove(first)
    inbox.end(first)
    inbox.put(second)
    inbox.end(first)  # once more: the second is not forgotten with it
    assert inbox.find("a") is second


def test_a_deadline_is_from_the_submission() -> None:
    assert job(timeout_s=2.5).deadline == 12.5
    assert job().deadline is None


def test_waiting_ends_with_work() -> None:
    inbox = Inbox(3, 1)
    for arrive in (lambda: inbox.put(job()), lambda: inbox.run(Task(lambda: None)), inbox.close):
        thread = threading.Thread(target=inbox.wait)
        thread.start()
        arrive()
        thread.join(10)
        assert not thread.is_alive()
        inbox.waiting.clear()
        inbox.tasks.clear()


def test_after_the_end_nothing_is_taken_and_everybody_is_told() -> None:
    inbox = Inbox(3, 1)
    running, waiting = job("a"), job("b")
    task = Task(lambda: 1)
    inbox.put(running)
    inbox.remove(running)
    inbox.put(waiting)
    inbox.run(task)
    inbox.abandon(EngineClosedError("the engine was closed"))
    for each in (running, waiting):
        with pytest.raises(EngineClosedError):
            each.channel.take()
    with pytest.raises(EngineClosedError):
        task.future.result(0)
    with pytest.raises(EngineClosedError):
        inbox.put(job("c"))
    with pytest.raises(EngineClosedError):
        inbox.run(Task(lambda: 1))
    assert inbox.closing
    assert inbox.find("a") is None


def test_a_task_is_done_in_pieces_and_reports_its_errors() -> None:
    pieces = iter((False, False, True))
    task = Task(lambda: "done", lambda: next(pieces))
    assert [task.advance() for _ in range(3)] == [False, False, True]
    assert task.future.result(0) == "done"

    def fail() -> None:
        raise ValueError("a bug")

    broken = Task(fail)
    assert broken.advance()
    with pytest.raises(ValueError, match="a bug"):
        broken.future.result(0)


def test_a_task_that_nobody_waits_for_any_more() -> None:
    task = Task(lambda: 1)
    assert task.future.cancel()
    assert task.advance()
    task.abandon(EngineClosedError("the engine was closed"))
