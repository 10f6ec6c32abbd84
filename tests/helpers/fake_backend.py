"""A backend that says what it was told to: for tests of the session and the screens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ziggurat.tui.backend import (
    Backend,
    BackendError,
    ChatEvent,
    ChatRequest,
    Delta,
    Done,
    Loading,
    ModelFile,
    ModelSetup,
    Planned,
    Progress,
    Status,
    Timings,
    Usage,
)
from ziggurat.tui.kept import Kept, KeptLayer


@dataclass
class Answer:
    """What is answered to one request: progress, pieces of text, and an error or an end.

    ``error`` is raised after all pieces. ``delay`` seconds pass before each piece; with ``hold`` the answer waits for
    that event after its pieces, as one does that is slow. ``thoughts`` come before the text.
    """

    pieces: Sequence[str] = ()
    progress: Sequence[float] = ()
    thoughts: Sequence[str] = ()
    error: BackendError | None = None
    reason: str = "stop"
    delay: float = 0.0
    hold: asyncio.Event | None = None
    usage: Usage | None = None
    timings: Timings | None = None

    @classmethod
    def of(cls, text: str, **more: object) -> Answer:
        """Return an answer of the words of a text, as if each were a token."""
        words = text.split(" ")
        return cls(pieces=[*(f"{word} " for word in words[:-1]), words[-1]], **more)  # type: ignore[arg-type]


STATUS = Status(
    model="fake",
    ours=True,
    description="fake 1B Q4_K",
    n_ctx=4096,
    n_ctx_train=8192,
    n_layer=4,
    kv_bytes=32 << 20,
    kv_bytes_full=128 << 20,
    kv_bytes_planned=33 << 20,
    process_bytes=700 << 20,
)


class FakeBackend:
    """Satisfies ``Backend``. Requests get the ``answers`` in turn, the last one again and again.

    An answer may be a text, an ``Answer``, or a function of the request that returns one. ``requests`` records what was
    asked, ``saved`` the conversations whose rows were kept; ``lost``, when set, is raised by everything.
    """

    def __init__(
        self,
        answers: Iterable[str | Answer | Callable[[ChatRequest], Answer]] = ("hello",),
        *,
        status: Status = STATUS,
        kept: Kept | None = None,
        names: tuple[str, ...] = ("fake",),
    ) -> None:
        self.answers = list(answers)
        self.requests: list[ChatRequest] = []
        self.saved: set[str] = set()
        self.lost: BackendError | None = None
        self.closed = False
        self.kept_rows, self.names = kept, names
        self._status = status
        self._stop = asyncio.Event()
        self._running = False

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        self.requests.append(request)
        self._check()
        told = self.answers[min(len(self.requests), len(self.answers)) - 1]
        answer = told(request) if callable(told) else Answer.of(told) if isinstance(told, str) else told
        self._stop, self._running = asyncio.Event(), True
        try:
            async for event in self._events(request, answer):
                yield event
        finally:
            self._running = False

    async def _events(self, request: ChatRequest, answer: Answer) -> AsyncGenerator[ChatEvent, None]:
        events: list[ChatEvent] = [Progress(fraction, 1000.0) for fraction in answer.progress]
        events += [Delta(thought, thought=True) for thought in answer.thoughts]
        events += map(Delta, answer.pieces)
        for event in events:
            if await self._stopped(answer.delay):
                yield Done("cancelled")
                return
            yield event
        if answer.hold is not None and await self._stopped_before(answer.hold):
            yield Done("cancelled")
            return
        self._check()
        if answer.error is not None:
            raise answer.error
        prompt = sum(len(message.content.split()) for message in request.messages)
        yield Done(
            answer.reason,  # type: ignore[arg-type]
            answer.usage or Usage(prompt, len(answer.pieces)),
            answer.timings or Timings(0.1, 1000.0, 50.0, kv_bytes=32 << 20, kv_bytes_full=128 << 20),
        )

    async def _stopped(self, delay: float) -> bool:
        """Wait, and tell whether the answer was stopped meanwhile."""
        if delay and not self._stop.is_set():
            try:
                await asyncio.wait_for(self._stop.wait(), delay)
            except asyncio.TimeoutError:
                pass
        elif not delay:
            await asyncio.sleep(0)
        return self._stop.is_set()

    async def _stopped_before(self, hold: asyncio.Event) -> bool:
        waits = [asyncio.ensure_future(event.wait()) for event in (hold, self._stop)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self._stop.is_set()

    async def stop(self) -> None:
        self._stop.set()

    async def status(self) -> Status:
        self._check()
        return replace(self._status, running=int(self._running))

    async def models(self) -> tuple[str, ...]:
        self._check()
        return self.names

    async def kept(self, conversation: str) -> Kept | None:
        self._check()
        return None if self.kept_rows is None else replace(self.kept_rows, conversation=conversation)

    async def text(self, tokens: Sequence[int]) -> str | None:
        self._check()
        return " ".join(f"w{token}" for token in tokens)

    async def count(self, text: str) -> int | None:
        self._check()
        return len(text.split())

    async def save(self, conversation: str) -> bool:
        self._check()
        self.saved.add(conversation)
        return True

    async def restore(self, conversation: str) -> bool:
        self._check()
        return conversation in self.saved

    async def close(self) -> None:
        self._stop.set()
        self.closed = True

    def _check(self) -> None:
        if self.lost is not None:
            raise self.lost


LOST = BackendError("nobody answers at http://127.0.0.1:8080", "start the server again", kind="lost", retryable=True)


def kept_pyramid(n_tokens: int = 400, budgets: Sequence[int] = (200, 120, 60, 20), heads: int = 2) -> Kept:
    """Return rows as a pyramid keeps them: first and last tokens in all layers, between them fewer and fewer."""
    layers = []
    for layer, budget in enumerate(budgets):
        recent = min(budget // 2, 32)
        spread = max(budget - recent - 4, 0)
        step = max((n_tokens - recent - 4) // max(spread, 1), 1)
        runs = [(0, 4), *((4 + place * step, 1) for place in range(spread)), (n_tokens - recent, recent)]
        layers.append(KeptLayer(layer, budget, tuple(tuple(runs) for _ in range(heads))))
    return Kept("fake", tuple(range(n_tokens)), tuple(layers))


@dataclass
class FakeHost:
    """Satisfies ``Host``: every load gives the backend of ``make``, after the ``steps`` were told.

    ``refuse`` is raised by ``load``; ``hold`` keeps it waiting. ``loaded`` records what was asked.
    """

    make: Callable[[ModelSetup], Backend] = lambda _setup: FakeBackend()
    files: tuple[ModelFile, ...] = (
        ModelFile(Path("/models/small.gguf"), 600 << 20, "llama", "Q4_K_M", 1_000_000_000, 8192, 128 << 20, 800 << 20),
        ModelFile(Path("/models/broken.gguf"), 12, trouble="is not a GGUF file"),
    )
    planned: Planned = Planned(800 << 20, 600 << 20, 32 << 20, 128 << 20, 8 << 30, 4096, (200, 120, 60, 20))
    steps: tuple[Loading, ...] = (Loading("loading", 0.5), Loading("ready", 1.0))
    refuse: BackendError | None = None
    hold: asyncio.Event | None = None
    loaded: list[ModelSetup] = field(default_factory=list)
    closed: bool = False

    async def plan(self, setup: ModelSetup) -> Planned:
        return self.planned

    async def load(self, setup: ModelSetup, tell: Callable[[Loading], None]) -> Backend:
        for step in self.steps[:-1]:
            tell(step)
            await asyncio.sleep(0)
        if self.hold is not None:
            await self.hold.wait()
        if self.refuse is not None:
            raise self.refuse
        for step in self.steps[-1:]:
            tell(step)
        self.loaded.append(setup)
        return self.make(setup)

    async def models(self) -> tuple[ModelFile, ...]:
        return self.files

    async def close(self) -> None:
        self.closed = True
