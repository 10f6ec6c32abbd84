"""Runs the scheduler over the stand-in for the library by a script, and looks at everything after every tick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from helpers.fake_library import END, Clock, FakeContext, FakeSampler, FakeVocab, Fault, Kind, next_token
from ziggurat.runtime.engine.admission import Inbox, Job
from ziggurat.runtime.engine.contexts import Serving
from ziggurat.runtime.engine.drafting import Drafting
from ziggurat.runtime.engine.generation import KVFigures
from ziggurat.runtime.engine.ngram import NgramDrafter
from ziggurat.runtime.engine.places import Turns
from ziggurat.runtime.engine.protocol import FinishEvent, GenerationRequest, TokenEvent
from ziggurat.runtime.engine.scheduler import Scheduler
from ziggurat.runtime.errors import EngineClosedError, QueueFullError, RequestTimeoutError

MOST_TICKS = 30_000


@dataclass(frozen=True)
class Ask:
    """A request: what it wants, the tick at which it comes, and the one at which it is cancelled."""

    prompt: tuple[int, ...]
    n: int | None = 8
    arrives: int = 0
    cancelled: int | None = None
    shared: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    conversation: str | None = None
    reread: bool = False
    speculate: bool = True
    timeout_s: float | None = None
    fails_at: int | None = None


@dataclass(frozen=True)
class World:
    """The context and the engine's settings."""

    kind: Kind = "budget"
    parallel: int = 2
    cached: int = 1
    lanes: int = 2
    queue_limit: int = 100
    gap: float = 3.0
    drafts: bool = False
    step_seconds: float = 0.01
    token_seconds: float = 0.0


@dataclass
class Outcome:
    """What became of a request."""

    job: Job
    sampler: FakeSampler
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""
    finish: FinishEvent | None = None
    error: BaseException | None = None
    refused: bool = False
    ended: int | None = None
    begun: int | None = None
    short: bool = True

    @property
    def reason(self) -> str | None:
        return None if self.finish is None else self.finish.reason


def alone(ask: Ask, world: World, n_ctx: int = 256) -> tuple[list[int], str, str]:
    """The tokens, the text and the end of a request that has a whole machine to itself."""
    seen, made, text = list(ask.prompt), list[int](), ""
    vocab = FakeVocab()
    while True:
        token = next_token(seen, ask.seed or 0, len(made))
        if vocab.is_eog(token):
            return made, text, "stop"
        made.append(token)
        seen.append(token)
        text += vocab.piece(token).decode()
        places = [place for place in (text.find(stop) for stop in ask.stop) if place >= 0]
        if places:
            return made, text[: min(places)], "stop"
        if len(made) == ask.n or (world.kind != "budget" and len(seen) > n_ctx):
            return made, text, "length"


class Watched(Scheduler):
    """Notes what begins, and how much was unread then."""

    began: list[tuple[Job, int]]

    def _begin(self, job: Job) -> None:
        self.began.append((job, self.slots.unread(job)))
        super()._begin(job)


class Run:
    """A scheduler in a world, with requests that come and go. ``clock`` is everybody's."""

    def __init__(self, world: World, asks: Sequence[Ask] = (), faults: Sequence[Fault] = ()) -> None:
        self.world, self.asks = world, list(asks)
        self.clock = Clock()
        self.context = FakeContext(
            self.clock,
            kind=world.kind,
            n_seq=world.parallel + world.cached,
            n_reading=world.lanes,
            seconds=lambda count: world.step_seconds + world.token_seconds * count,
        )
        self.context.faults = {fault.at: fault for fault in faults}
        self.inbox = Inbox(world.parallel + world.queue_limit, world.parallel)
        drafts = world.drafts and world.kind != "recurrent"  # nothing of it can be taken back
        drafting = Drafting([NgramDrafter((END,))], 8, self.clock) if drafts else None
        turns = Turns(self.context.settings.n_ctx, world.parallel, world.lanes, world.gap)
        self.scheduler = Watched(self.inbox, turns, drafting=drafting, clock=self.clock)
        self.scheduler.began = []
        endless = world.kind == "budget"
        rows = self.context.capacity if endless else (self.context.settings.n_ctx,) * self.context.n_layer
        figures = KVFigures(1, 2, 3, rows, endless)
        library: Any = self.context
        self.scheduler.use(Serving(library, self.context.new_batch(), figures, self._rows, 1, 2))
        self.outcomes: dict[int, Outcome] = {}
        self.ticks = 0

    def __repr__(self) -> str:
        faults = [*self.context.faults.values(), *self.context.fired]
        return f"Run({self.world}, {self.asks}, {faults})"

    def _rows(self, n_tokens: int) -> tuple[int, ...]:
        """More for short prompts above than for long ones, as the schedules do."""
        first, *others = self.context.rows
        return (max(12, first - n_tokens // 16), *others)

    # requests

    def submit(self, place: int) -> Outcome:
        ask = self.asks[place]
        request = GenerationRequest(
            tokens=ask.prompt,
            max_tokens=ask.n,
            stop=ask.stop,
            conversation=ask.conversation,
            reread=ask.reread,
            speculate=ask.speculate,
            timeout_s=ask.timeout_s,
            id=f"request {place}",
        )
        sampler = FakeSampler(ask.seed, ask.fails_at)
        taken: Any = sampler
        job = Job(request, list(ask.prompt), taken, self.clock(), ask.shared)
        outcome = self.outcomes[place] = Outcome(job, sampler)
        try:
            self.inbox.put(job)
        except (QueueFullError, EngineClosedError):
            outcome.refused = True
        return outcome

    def cancel(self, place: int) -> None:
        """As an engine does it, from whatever thread."""
        outcome = self.outcomes.get(place)
        if outcome is not None and not outcome.refused and self.inbox.find(outcome.job.request.id) is outcome.job:
            outcome.job.cancelled = True
            self.scheduler.interrupt(outcome.job)

    def to_the_end(self) -> dict[int, Outcome]:
        """Run until every request has ended."""
        last = max((ask.arrives for ask in self.asks), default=0)
        while self.ticks <= last or self.inbox.waiting or self.scheduler.running or self.inbox.tasks:
            self.tick()
            assert self.ticks < MOST_TICKS, "somebody waits for ever"
        self.check_end()
        return self.outcomes

    def tick(self) -> bool:
        for place, ask in enumerate(self.asks):
            if ask.arrives == self.ticks:
                self.submit(place)
            if ask.cancelled == self.ticks:
                self.cancel(place)
        worked = self.scheduler.tick()
        if not worked:
            self.clock.now += 0.001
        self.ticks += 1
        self.collect()
        self.check()
        return worked

    def collect(self) -> None:
        for outcome in self.outcomes.values():
            while outcome.ended is None and not outcome.refused:
                try:
                    events = outcome.job.channel.take_ready(lambda: None)
                except StopIteration:
                    assert outcome.finish is not None, "an end without its event"
                    outcome.ended = self.ticks
                    break
                except Exception as error:
                    assert outcome.finish is None, "an error after the last event"
                    outcome.error, outcome.ended = error, self.ticks
                    break
                if not events:
                    break
                for event in events:
                    assert outcome.finish is None, "something follows the last event"
                    outcome.text += event.text
                    if isinstance(event, TokenEvent):
                        outcome.tokens.append(event.token)
                        outcome.times.append(self.clock())
                    else:
                        outcome.finish = event

    # what has to hold

    def check(self) -> None:
        """After every tick: nothing is beyond its limit, and the books say what the library has."""
        scheduler, context = self.scheduler, self.context
        assert not context.misuses, context.misuses
        assert len(scheduler.running) <= self.world.parallel
        reading = [generation for generation in scheduler.running if generation.reading]
        assert set(reading) == set(scheduler.reading.lanes)
        assert len(scheduler.reading.lanes) == len(reading)
        assert sum(generation.takes_lane for generation in reading) <= self.world.lanes
        assert {slot.generation for slot in scheduler.slots.all} - {None} == set(scheduler.running)
        for slot, held in zip(scheduler.slots.all, context.sequences, strict=True):
            generation = slot.generation
            part = 0 if generation is None or not generation.parts else len(held.tokens) - len(slot.tokens)
            in_part = [] if not part else generation.parts[0][:part]  # type: ignore[union-attr]
            assert held.tokens == slot.tokens + in_part, f"sequence {slot.index}"
            assert (held.reading is None) or (generation is not None and generation.reading)
            if slot.budgets:
                assert slot.budgets == held.budget
            if generation is None:
                assert slot.removable_from == context.removable_from(slot.index)
                assert slot.rows == sum(held.used)
                assert slot.evicted == (len(held.tokens) * context.n_layer - sum(held.used))
            elif generation.job.request.reread and generation.reading and len(slot.tokens):
                assert sum(held.used) == len(held.tokens) * context.n_layer, "rows were evicted from what is reread"
        assert len(self.inbox._jobs) == len(self.inbox.waiting) + len(scheduler.running)

    def check_end(self) -> None:
        """Everybody got what was asked for, once, and the figures add up."""
        counts = self.scheduler.counts
        taken = [outcome for outcome in self.outcomes.values() if not outcome.refused]
        for outcome in taken:
            assert outcome.ended is not None
            assert not outcome.sampler.wrong, outcome.sampler.wrong
            assert outcome.sampler.closed == 1
        for place, outcome in self.outcomes.items():
            if not outcome.refused:
                self._check_result(self.asks[place], outcome)
        reasons = [outcome.reason for outcome in taken]
        assert counts.cancelled == reasons.count("cancelled")
        assert counts.failed == reasons.count(None)
        assert counts.finished == len(taken) - counts.cancelled - counts.failed
        assert counts.generated_tokens == sum(len(outcome.tokens) for outcome in taken)
        assert self.inbox.refused == len(self.outcomes) - len(taken)
        assert not self.inbox._jobs
        assert 0 <= counts.accepted_tokens <= counts.drafted_tokens
        assert counts.reused_tokens <= counts.prompt_tokens

    def _check_result(self, ask: Ask, outcome: Outcome) -> None:
        tokens, text, reason = alone(ask, self.world)
        whole = outcome.reason in ("stop", "length")
        assert outcome.tokens == (tokens if whole else tokens[: len(outcome.tokens)])
        if whole:
            assert (outcome.text, outcome.reason) == (text, reason)
        if isinstance(outcome.error, RequestTimeoutError):
            assert ask.timeout_s is not None
        if outcome.finish is None:
            return
        stats = outcome.finish.stats
        assert stats.generated_tokens == len(outcome.tokens)
        assert stats.prompt_tokens == len(ask.prompt)
        assert 0 <= stats.reused_tokens <= len(ask.prompt)
        assert stats.queue_seconds >= 0 <= stats.time_to_first_token_s
        assert stats.accepted_tokens + stats.decode_steps + 1 >= stats.generated_tokens


def follow_up(ask: Ask, world: World, more: Sequence[int], **values: Any) -> Ask:
    """What is said after an answer, with all of it before."""
    return replace(ask, prompt=(*ask.prompt, *alone(ask, world)[0], *more), **values)
