"""A chat as it happens: sends, streams, stops, answers again, and tells listeners. It knows no widget and no database.

Everything runs on one event loop; methods that are not async return at once, and the answer goes on in a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from ziggurat.tui.answer import RunningAnswer
from ziggurat.tui.backend import Backend, BackendError, ChatEvent, ChatRequest, Delta, Done, Progress, Sampling
from ziggurat.tui.conversation import Attachment, Conversation, Message, new_id, title_of
from ziggurat.tui.figures import Figures, FiguresKeeper
from ziggurat.tui.session_events import (
    Added,
    Discarded,
    Failed,
    Finished,
    Grew,
    Listener,
    NoRecorder,
    NotSaved,
    PathChanged,
    Recorder,
    RecordError,
    SessionEvent,
    State,
    StateChanged,
    Titled,
)

_logger = logging.getLogger(__name__)

# seconds before each new try of a request that got no answer
_RETRIES = (0.5, 1.5, 4.0)


class Session:
    """One conversation at a time with one backend at a time; both can be changed while no answer runs.

    Listeners may send again from ``StateChanged("idle")`` on, which is the last event of every answer.

    ``clock`` tells monotonic seconds, ``now`` seconds since the epoch, ``retries`` the seconds before each new try.
    """

    def __init__(
        self,
        backend: Backend | None = None,
        *,
        conversation: Conversation | None = None,
        recorder: Recorder | None = None,
        sampling: Sampling | None = None,
        reread: bool = False,
        model: str = "",
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        retries: tuple[float, ...] = _RETRIES,
    ) -> None:
        self.backend = backend
        self.conversation = conversation or Conversation()
        self.sampling = sampling or Sampling()
        self.reread, self.model = reread, model
        self.state: State = "idle"
        #: Why the last request failed; None once another one is sent.
        self.error: BackendError | None = None
        self._figures = FiguresKeeper(clock)
        self._recorder: Recorder = recorder or NoRecorder()
        self.now, self._retries = now, retries
        self._listeners: list[Listener] = []
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Have a function called with every event, from the loop's thread; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    @property
    def busy(self) -> bool:
        """Whether an answer runs."""
        return self._task is not None and not self._task.done()

    def figures(self) -> Figures:
        """Return the figures of the answer that runs or ran last; for readouts, several times a second."""
        return self._figures.now()

    def send(self, text: str, attachments: tuple[Attachment, ...] = ()) -> Message:
        """Say something after what is shown, and have it answered."""
        return self._say(self.conversation.head, text, attachments)

    def edit(self, message_id: str, text: str, attachments: tuple[Attachment, ...] | None = None) -> Message:
        """Say something else in place of an earlier message of the person's; the old one stays as a branch."""
        old = self.conversation.messages[message_id]
        assert old.role == "user"
        self._assert_idle()
        self.conversation.head = old.parent
        self._tell(PathChanged())
        return self._say(old.parent, text, old.attachments if attachments is None else attachments)

    def regenerate(self, message_id: str | None = None) -> None:
        """Have an answer given again, by default the last one shown; the old one stays as a branch."""
        self._assert_idle()
        target = message_id or self.conversation.head
        if target is None:
            return
        message = self.conversation.messages[target]
        asked = message.parent if message.role == "assistant" else message.id
        self.conversation.head = asked
        self._tell(PathChanged())
        self._answer(asked)

    def retry(self) -> None:
        """Have the last message answered after a failure."""
        if self.conversation.head is not None:
            self.regenerate(self.conversation.head)

    def step(self, message_id: str, by: int) -> None:
        """Show the version of a message that is ``by`` further on."""
        self._assert_idle()
        self.conversation.step(message_id, by)
        self._record_change()
        self._tell(PathChanged())

    def open(self, conversation: Conversation) -> None:
        """Go on with another conversation."""
        self._assert_idle()
        self.conversation, self.error = conversation, None
        self._figures.forget()
        self._tell(PathChanged())

    def rename(self, title: str) -> None:
        """Give the conversation a title."""
        self.conversation.title = title
        self._record_change()
        self._tell(Titled(title))

    def set_system(self, text: str) -> None:
        """Take another system prompt, from the next message on."""
        self.conversation.system = text
        self._record_change()

    async def stop(self) -> None:
        """End the running answer; what came of it stays. Returns when it has ended."""
        task = self._task
        if task is None or task.done():
            return
        self._stopped = True
        await asyncio.sleep(0)  # a task that has not begun would be cancelled without a word
        if self.state in ("waiting", "retrying"):
            task.cancel()
        elif self.backend is not None:
            with contextlib.suppress(BackendError):
                await self.backend.stop()
        await asyncio.wait([task], timeout=1.0)
        if not task.done():  # a backend that does not end by itself
            task.cancel()
            await asyncio.wait([task])

    async def wait(self) -> None:
        """Return when no answer runs any more."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def refresh(self) -> None:
        """Ask the backend what it does, for ``figures``. Raises BackendError."""
        if self.backend is not None:
            status = await self.backend.status()
            self.model = status.model
            self._figures.status = status

    def _assert_idle(self) -> None:
        assert not self.busy, "an answer runs"

    def _say(self, parent: str | None, text: str, attachments: tuple[Attachment, ...]) -> Message:
        self._assert_idle()
        conversation = self.conversation
        message = Message(new_id(), parent, "user", text, self.now(), attachments)
        is_first = not conversation.messages
        if is_first and not conversation.title:
            conversation.title = title_of(text or (attachments[0].name if attachments else ""))
        conversation.add(message)
        with self._recording() as recorder:
            if is_first:
                recorder.begin(conversation)
            recorder.add(conversation.id, message)
        self._tell(Added(message))
        if is_first:
            self._tell(Titled(conversation.title))
        self._answer(message.id)
        return message

    def _answer(self, asked: str | None) -> None:
        self.error, self._stopped = None, False
        answer = Message(new_id(), asked, "assistant", "", self.now(), model=self.model)
        self.conversation.add(answer)
        self._tell(Added(answer))
        self._task = asyncio.get_running_loop().create_task(self._run(RunningAnswer(answer)))

    async def _run(self, answer: RunningAnswer) -> None:
        conversation = self.conversation
        request = ChatRequest(
            conversation.prompt(answer.message.parent), self.sampling, conversation.id, reread=self.reread
        )
        try:
            for wait in (*self._retries, None):
                self._enter("waiting")
                self._figures.start()
                try:
                    await self._stream(request, answer)
                    return
                except BackendError as error:
                    if not await self._tried_again(error, answer, wait):
                        self.error, answer.error = error, error
                        return
        except asyncio.CancelledError:
            answer.ending = "cancelled"
            if not self._stopped:
                raise
        except Exception as error:
            _logger.exception("a chat failed")
            self.error = answer.error = BackendError(f"the chat failed ({error})", "its log says where")
        finally:
            self._end(answer)

    async def _tried_again(self, error: BackendError, answer: RunningAnswer, wait: float | None) -> bool:
        """Wait for a new try if there should be one: only where nothing came yet, so that nothing is shown twice."""
        if not error.retryable or wait is None or answer.came or self._stopped:
            return False
        wait = max(wait, min(error.retry_after_s or 0.0, 30.0))
        self._enter("retrying")
        self._tell(Failed(error, wait))
        await asyncio.sleep(wait)
        return True

    async def _stream(self, request: ChatRequest, answer: RunningAnswer) -> None:
        if self.backend is None:
            raise BackendError("there is no model", "open one first", kind="refused")
        async with contextlib.aclosing(self.backend.chat(request)) as events:
            async for event in events:
                self._take(event, answer)

    def _take(self, event: ChatEvent, answer: RunningAnswer) -> None:
        self._figures.take(event)
        if isinstance(event, Progress):
            self._enter("reading")
        elif isinstance(event, Delta):
            self._enter("answering")
            answer.take(event)
            self._tell(Grew(answer.message.id, event.text, event.thought))
        elif isinstance(event, Done):
            answer.ending = event.reason
            answer.done = event

    def _end(self, answer: RunningAnswer) -> None:
        message = answer.finished()
        self._figures.end()
        if message.text or message.thought or message.ending in ("stop", "length"):
            self.conversation.replace(message)
            with self._recording() as recorder:
                recorder.add(self.conversation.id, message)
            self._tell(Finished(message))
        else:
            self.conversation.discard(message.id)
            self._tell(Discarded(message.id))
        if self.error is not None:
            self._tell(Failed(self.error))
        self._task = None
        self._enter("idle")

    def _enter(self, state: State) -> None:
        if state != self.state:
            self.state = state
            self._tell(StateChanged(state))

    def _record_change(self) -> None:
        if self.conversation.messages:
            with self._recording() as recorder:
                recorder.change(self.conversation)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[Recorder]:
        try:
            yield self._recorder
        except RecordError as error:
            self._tell(NotSaved(error))

    def _tell(self, event: SessionEvent) -> None:
        for listener in list(self._listeners):
            listener(event)
