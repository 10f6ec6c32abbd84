"""The session: what it sends, what it tells, and what stays of it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from helpers.fake_backend import LOST, Answer, FakeBackend
from ziggurat.tui.backend import BackendError, Usage
from ziggurat.tui.conversation import Conversation, Message
from ziggurat.tui.session import Session
from ziggurat.tui.session_events import (
    Added,
    Discarded,
    Failed,
    Finished,
    Grew,
    NotSaved,
    PathChanged,
    RecordError,
    SessionEvent,
    StateChanged,
)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def listened(session: Session) -> list[SessionEvent]:
    events: list[SessionEvent] = []
    session.listen(events.append)
    return events


def texts(session: Session) -> list[str]:
    return [message.text for message in session.conversation.path()]


def test_answer_streams_and_stays() -> None:
    async def work() -> None:
        backend = FakeBackend([Answer(["a", "b"], progress=[0.5, 1.0], usage=Usage(7, 2, 3))])
        session = Session(backend)
        events = listened(session)
        session.send("hello there")
        assert session.busy
        await session.wait()
        assert texts(session) == ["hello there", "ab"]
        assert session.conversation.title == "hello there"
        assert [event.state for event in events if isinstance(event, StateChanged)] == [
            "waiting",
            "reading",
            "answering",
            "idle",
        ]
        assert [event.text for event in events if isinstance(event, Grew)] == ["a", "b"]
        finished = next(event for event in events if isinstance(event, Finished))
        assert finished.message.usage == Usage(7, 2, 3) and finished.message.ending == "stop"
        assert session.figures().context_used == 9

    run(work())


def test_system_and_history_are_sent() -> None:
    async def work() -> None:
        backend = FakeBackend(["one", "two"])
        session = Session(backend)
        session.set_system("be brief")
        session.send("first")
        await session.wait()
        session.send("second")
        await session.wait()
        sent = backend.requests[-1]
        assert [(message.role, message.content) for message in sent.messages] == [
            ("system", "be brief"),
            ("user", "first"),
            ("assistant", "one"),
            ("user", "second"),
        ]
        assert sent.conversation == session.conversation.id

    run(work())


def test_stop_keeps_what_came() -> None:
    async def work() -> None:
        backend = FakeBackend([Answer(["half "], hold=asyncio.Event())])
        session = Session(backend)
        events = listened(session)
        session.send("go")
        while not any(isinstance(event, Grew) for event in events):
            await asyncio.sleep(0)
        await session.stop()
        assert not session.busy and session.state == "idle" and session.error is None
        assert session.conversation.path()[-1].ending == "cancelled"
        assert texts(session) == ["go", "half "]

    run(work())


def test_stop_before_anything_came_discards_the_answer() -> None:
    async def work() -> None:
        session = Session(FakeBackend([Answer(hold=asyncio.Event())]))
        events = listened(session)
        session.send("go")
        await asyncio.sleep(0)
        await session.stop()
        assert texts(session) == ["go"]
        assert isinstance(events[-2], Discarded)

    run(work())


def test_stop_ends_a_backend_that_does_not() -> None:
    class Deaf(FakeBackend):
        async def stop(self) -> None:
            raise LOST

    async def work() -> None:
        session = Session(Deaf([Answer(["x"], hold=asyncio.Event())]))
        session.send("go")
        while texts(session)[-1:] == ["go"] or session.state != "answering":
            await asyncio.sleep(0)
        await session.stop()
        assert not session.busy and session.conversation.path()[-1].ending == "cancelled"

    run(work())


def test_regenerate_keeps_both_answers() -> None:
    async def work() -> None:
        session = Session(FakeBackend(["one", "two"]))
        session.send("go")
        await session.wait()
        first = session.conversation.path()[-1]
        session.regenerate()
        await session.wait()
        second = session.conversation.path()[-1]
        assert second.text == "two" and session.conversation.siblings(second.id) == [first.id, second.id]
        session.step(second.id, -1)
        assert texts(session) == ["go", "one"]

    run(work())


def test_edit_makes_a_branch_and_going_back_shows_all_of_the_old_one() -> None:
    async def work() -> None:
        backend = FakeBackend(["1", "2", "3"])
        session = Session(backend)
        first = session.send("a")
        await session.wait()
        session.send("b")
        await session.wait()
        events = listened(session)
        changed = session.edit(first.id, "A")
        await session.wait()
        assert isinstance(events[0], PathChanged) and isinstance(events[1], Added)
        assert texts(session) == ["A", "3"]
        assert [message.content for message in backend.requests[-1].messages] == ["A"]
        session.step(changed.id, 1)
        assert texts(session) == ["a", "1", "b", "2"]

    run(work())


def test_request_that_nobody_took_is_tried_again() -> None:
    async def work() -> None:
        session = Session(FakeBackend([Answer(error=LOST), "back"]), retries=(0.0,))
        events = listened(session)
        session.send("go")
        await session.wait()
        assert texts(session) == ["go", "back"] and session.error is None
        failed = [event for event in events if isinstance(event, Failed)]
        assert [event.retry_in for event in failed] == [0.0]

    run(work())


def test_failure_keeps_the_question_and_can_be_retried() -> None:
    async def work() -> None:
        session = Session(FakeBackend([Answer(error=LOST), Answer(error=LOST), "back"]), retries=(0.0,))
        session.send("go")
        await session.wait()
        assert texts(session) == ["go"] and session.error is LOST
        session.retry()
        await session.wait()
        assert texts(session) == ["go", "back"] and session.error is None

    run(work())


def test_broken_answer_keeps_what_came_and_is_not_tried_again() -> None:
    async def work() -> None:
        backend = FakeBackend([Answer(["ha"], error=LOST)])
        session = Session(backend, retries=(0.0,))
        session.send("go")
        await session.wait()
        last = session.conversation.path()[-1]
        assert (last.text, last.ending, last.error) == ("ha", "failed", str(LOST))
        assert len(backend.requests) == 1

    run(work())


def test_refused_request_is_not_tried_again() -> None:
    async def work() -> None:
        refused = BackendError("too long", "shorten it", kind="too_long")
        backend = FakeBackend([Answer(error=refused)])
        session = Session(backend, retries=(0.0,))
        session.send("go")
        await session.wait()
        assert session.error is refused and len(backend.requests) == 1

    run(work())


def test_stop_while_waiting_for_a_new_try() -> None:
    async def work() -> None:
        session = Session(FakeBackend([Answer(error=LOST)]), retries=(60.0,))
        session.send("go")
        while session.state != "retrying":
            await asyncio.sleep(0)
        await session.stop()
        assert texts(session) == ["go"] and not session.busy

    run(work())


def test_bug_in_a_backend_is_told_and_ends_the_answer() -> None:
    class Broken(FakeBackend):
        async def status(self) -> Any:
            raise ValueError

        def chat(self, request: Any) -> Any:
            raise ValueError("oops")

    async def work() -> None:
        session = Session(Broken())
        session.send("go")
        await session.wait()
        assert session.error is not None and "oops" in str(session.error)

    run(work())


class Records:
    def __init__(self) -> None:
        self.begun: list[str] = []
        self.added: list[Message] = []
        self.changed = 0

    def begin(self, conversation: Conversation) -> None:
        self.begun.append(conversation.id)

    def add(self, conversation_id: str, message: Message) -> None:
        self.added.append(message)

    def change(self, conversation: Conversation) -> None:
        self.changed += 1


def test_only_finished_messages_are_recorded() -> None:
    async def work() -> None:
        records = Records()
        session = Session(FakeBackend(["one", Answer(error=refusal())]), recorder=records)
        session.set_system("nothing to keep yet")
        session.send("go")
        assert [message.text for message in records.added] == ["go"]
        await session.wait()
        session.send("on")
        await session.wait()
        session.rename("other")
        assert [message.text for message in records.added] == ["go", "one", "on"]
        assert records.begun == [session.conversation.id] and records.changed == 1

    run(work())


def refusal() -> BackendError:
    return BackendError("no", kind="refused")


def test_chat_goes_on_where_nothing_can_be_recorded() -> None:
    class Full(Records):
        def add(self, conversation_id: str, message: Message) -> None:
            raise RecordError("the disk is full")

    async def work() -> None:
        session = Session(FakeBackend(["one"]), recorder=Full())
        events = listened(session)
        session.send("go")
        await session.wait()
        assert texts(session) == ["go", "one"]
        assert sum(isinstance(event, NotSaved) for event in events) == 2

    run(work())


def test_status_is_told_by_figures() -> None:
    async def work() -> None:
        session = Session(FakeBackend())
        await session.refresh()
        figures = session.figures()
        assert session.model == "fake" and figures.kv_bytes_full == 128 << 20
        assert figures.context_part == 0.0

    run(work())


def test_progress_is_told_while_the_prompt_is_read() -> None:
    async def work() -> None:
        session = Session(FakeBackend([Answer(progress=[0.25], hold=asyncio.Event())]))
        session.send("go")
        while session.state != "reading":
            await asyncio.sleep(0)
        figures = session.figures()
        assert (figures.progress, figures.prompt_rate) == (0.25, 1000.0)
        await session.stop()
        assert session.figures().progress is None

    run(work())


def test_messages_of_one_side_in_a_row_are_sent_as_one() -> None:
    conversation = Conversation()
    for place, (role, text) in enumerate((("user", "a"), ("assistant", ""), ("user", "b"))):
        conversation.add(Message(str(place), conversation.head, role, text, 0.0))  # type: ignore[arg-type]
    assert [message.content for message in conversation.prompt("2")] == ["a\n\nb"]
