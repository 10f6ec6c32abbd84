"""The scheduler over a stand-in for the library: who gets in, what is computed, and that each gets what is theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_library import POISON, Fault
from helpers.schedules import Ask, Run, World, alone, follow_up
from ziggurat.runtime.errors import ContextError, DecodeAborted, DecodeError, EngineError, RequestTimeoutError

#: None of them may cost more than the request it hits; an abort none at all.
ERRORS: dict[str, Callable[[], Exception | None]] = {
    "nothing": lambda: None,
    "aborted": lambda: DecodeAborted("aborted", 2),
    "failed": lambda: DecodeError("failed", -3),
    "refused": lambda: ContextError("no room"),
    "memory": lambda: MemoryError(),
    "bug": lambda: RuntimeError("a bug"),
}


def text(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(1 + (n * n + 5 * n * salt + 3 * salt) % 50 for n in range(length))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    parallel = draw(st.integers(1, 4))
    return World(
        kind=draw(st.sampled_from(("budget", "budget", "plain", "window", "recurrent"))),
        parallel=parallel,
        cached=draw(st.integers(0, 2)),
        lanes=min(parallel, draw(st.integers(1, 3))),
        queue_limit=draw(st.sampled_from((1, 3, 100))),
        gap=draw(st.sampled_from((1.5, 3.0, 10.0))),
        drafts=draw(st.booleans()),
        token_seconds=draw(st.sampled_from((0.0, 0.001))),
    )


@st.composite
def asks(draw: st.DrawFn, world: World, earlier: list[Ask]) -> Ask:
    start = text(draw(st.sampled_from((0, 17, 20, 30))), draw(st.integers(0, 1)))
    prompt = start + text(draw(st.sampled_from((1, 2, 15, 16, 40, 120))), draw(st.integers(2, 5)))
    if draw(st.integers(0, 15)) == 0:
        prompt = (*prompt, POISON)
    values: dict[str, Any] = {
        "n": draw(st.sampled_from((1, 2, 9, 30, 60))),
        "arrives": draw(st.sampled_from((0, 0, 1, 5, 20, 60))),
        "cancelled": draw(st.none() | st.none() | st.integers(0, 80)),
        "shared": draw(st.sampled_from((0, len(start)))),
        "seed": draw(st.none() | st.integers(1, 3)),
        "stop": draw(st.sampled_from(((), (), ("CB",), ("ABC", "FF")))),
        "conversation": draw(st.sampled_from((None, "a", "b"))),
        "reread": draw(st.booleans()),
        "speculate": draw(st.booleans()),
        "timeout_s": draw(st.none() | st.none() | st.sampled_from((0.02, 0.2, 1.0))),
        "fails_at": draw(st.none() | st.none() | st.none() | st.integers(0, 5)),
    }
    if earlier and draw(st.booleans()):
        longer = follow_up(draw(st.sampled_from(earlier)), world, text(draw(st.integers(1, 20)), 7), **values)
        if len(longer.prompt) < 200:
            return longer
    elif earlier and draw(st.booleans()):
        return Ask(draw(st.sampled_from(earlier)).prompt, **values)  # the same once more, or again
    return Ask(prompt, **values)


@st.composite
def schedules(draw: st.DrawFn) -> Run:
    world = draw(worlds())
    made: list[Ask] = []
    for _ in range(draw(st.integers(1, 9))):
        made.append(draw(asks(world, made)))
    run = Run(world, made)
    for at in draw(st.lists(st.integers(0, 250), max_size=6, unique=True)):
        kind = draw(st.sampled_from((*ERRORS, "cancel")))
        victim = draw(st.integers(0, len(made) - 1))
        action = (lambda victim=victim: run.cancel(victim)) if kind == "cancel" else None
        seconds = draw(st.sampled_from((0.0, 0.0, 0.1)))
        run.context.faults[at] = Fault(at, ERRORS.get(kind, ERRORS["nothing"])(), action, seconds)
    return run


def may_fail(run: Run, place: int) -> bool:
    ask = run.asks[place]
    # a recurrent state cannot be set back when a computation was aborted in the middle of a prompt
    return (
        ask.timeout_s is not None or ask.fails_at is not None or POISON in ask.prompt or run.world.kind == "recurrent"
    )


@settings(max_examples=300, derandomize=True)
@given(schedules())
def test_everyone_gets_what_each_gets_alone(run: Run) -> None:
    outcomes = run.to_the_end()
    broken = [fault for fault in run.context.fired if fault.error and not isinstance(fault.error, DecodeAborted)]
    failed = [place for place, outcome in outcomes.items() if outcome.error is not None and not may_fail(run, place)]
    assert len(failed) <= len(broken)
    for outcome in outcomes.values():
        assert outcome.error is None or isinstance(outcome.error, (EngineError, ContextError, DecodeError))
        assert outcome.reason != "cancelled" or outcome.job.cancelled


def lasting(count: int, **values: Any) -> Ask:
    """A short prompt whose answer does not end before so many tokens."""
    asks = (Ask(text(5, 1), None, seed=seed, **values) for seed in range(1, 250))
    return next(ask for ask in asks if len(alone(ask, World())[0]) >= count)


def begin_order(run: Run) -> list[int]:
    return [int(job.request.id.split()[1]) for job, _ in run.scheduler.began]


@settings(max_examples=100, derandomize=True)
@given(st.lists(st.sampled_from((3, 16, 17, 60, 150)), min_size=2, max_size=12), st.integers(1, 4), st.integers(1, 3))
def test_who_comes_first_begins_first_but_for_short_ones(lengths: list[int], parallel: int, lanes: int) -> None:
    world = World(kind="plain", parallel=parallel, cached=0, lanes=min(parallel, lanes))
    run = Run(world, [Ask(text(length, 3 + place), 12) for place, length in enumerate(lengths)])
    run.to_the_end()
    order = begin_order(run)
    assert sorted(order) == list(range(len(lengths)))
    short = [length <= run.context.n_ubatch for length in lengths]
    for place, first in enumerate(order):
        overtaken = [other for other in order[place + 1 :] if other < first]
        assert not overtaken or short[first]
        assert not any(short[other] for other in overtaken)


def test_a_long_prompt_is_not_put_off_by_ever_more_short_ones() -> None:
    """One of them is always being read: the place of the long one must not be taken by them."""
    world = World(kind="plain", parallel=4, cached=0, lanes=2)
    long_one = Ask(text(150, 1), 4, arrives=1)
    run = Run(world, [Ask(text(100, 2), 4), long_one, *(Ask(text(9, 3 + n), 2, arrives=n // 2) for n in range(200))])
    run.to_the_end()
    assert begin_order(run).index(1) < 30


@settings(max_examples=60, derandomize=True)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=6),
    st.sampled_from((1.5, 3.0, 10.0)),
    st.sampled_from((0.01, 0.05)),
    st.sampled_from((0.0, 0.0005)),
    st.sampled_from(("plain", "budget")),
)
def test_between_two_tokens_passes_no_more_than_the_gap_and_a_piece(
    lengths: list[int], gap: float, step: float, token: float, kind: Any
) -> None:
    world = World(kind, parallel=4, cached=0, gap=gap, step_seconds=step, token_seconds=token)
    decoding = lasting(100)
    run = Run(world, [decoding, *(Ask(text(length, 2 + n), 5, 10 + n) for n, length in enumerate(lengths))])
    run.to_the_end()
    undisturbed, piece = step + 4 * token, step + 16 * token
    pauses = [b - a for a, b in zip(run.outcomes[0].times, run.outcomes[0].times[1:], strict=False)]
    assert max(pauses, default=0.0) <= gap * undisturbed + piece + 1e-9


def test_prompts_are_read_while_others_decode_as_the_gap_allows() -> None:
    """With a gap of ten steps several pieces go between two tokens, with one of 1.5 a single one."""
    ticks = []
    for gap in (1.5, 10.0):
        asks = [lasting(60), Ask(text(200, 2), 1, arrives=20)]
        run = Run(World("plain", parallel=2, cached=0, gap=gap), asks)
        run.to_the_end()
        ended, begun = run.outcomes[1].ended, 20
        assert ended is not None
        ticks.append(ended - begun)
    assert ticks[0] >= 13  # pieces of 16 tokens
    assert ticks[1] <= 3


@pytest.mark.parametrize("kind", ["plain", "budget", "recurrent"])
def test_short_prompts_that_wait_together_are_read_together(kind: Any) -> None:
    """As many as go into a ubatch; so they answer together from then on."""
    asks = [Ask(text(length, length), 4) for length in (9, 4, 12, 3)]
    run = Run(World(kind, parallel=4, cached=0, lanes=1), asks)
    run.to_the_end()
    assert run.context.prompts == [(0, 1, 3), (2,)]
    assert len(run.context.decoded) <= 4


def test_a_short_prompt_is_read_beside_the_end_of_a_long_one() -> None:
    run = Run(World("plain", parallel=2, cached=0, lanes=1), [Ask(text(36, 1), 2), Ask(text(12, 2), 2, arrives=2)])
    run.to_the_end()
    assert run.context.prompts[-1] == (0, 1)


@pytest.mark.parametrize("kind", ["plain", "budget"])
def test_when_prompts_fail_together_only_those_are_lost_that_fail_alone(kind: Any) -> None:
    asks = [Ask(text(length, length), 4) for length in (4, 5, 6)]
    together = Fault(0, ContextError("no room"))
    for first_alone in (None, DecodeError("failed", -3)):
        faults = [together, *([Fault(1, first_alone)] if first_alone else [])]
        run = Run(World(kind, parallel=3, cached=0), asks, faults)
        outcomes = run.to_the_end()
        assert len(run.context.fired) == len(faults)
        assert [outcomes[place].error for place in range(3)] == [first_alone, None, None]
        assert run.context.prompts == [(0,), (1,), (2,)][1 if first_alone else 0 :]


@pytest.mark.parametrize("kind", ["plain", "budget", "window", "recurrent"])
@pytest.mark.parametrize("length", [10, 100])
def test_the_same_prompt_is_read_once_for_all_that_wait(kind: Any, length: int) -> None:
    """Also when rows of it are evicted, so that nothing could go on from before its end."""
    asks = [Ask(text(length, 1), 9, seed=place) for place in range(3)]
    run = Run(World(kind, parallel=3, cached=0), [*asks, Ask(text(length, 1), 9, arrives=1, reread=True)])
    run.to_the_end()
    stats = [outcome.finish.stats for outcome in run.outcomes.values() if outcome.finish]
    assert [each.reused_tokens for each in stats[:3]] == [0, length, length]
    assert run.scheduler.counts.prompt_tokens == 4 * length


def test_what_another_prompt_begins_with_is_waited_for() -> None:
    """Unless that one is so long that to read it beside that takes less time."""
    start = text(60, 1)
    for rest, reused in ((20, 60), (180, 0)):
        asks = [Ask(start + text(rest, 2), 1), Ask(start + text(10, 3), 1)]
        run = Run(World("plain", parallel=3, cached=0, lanes=3), asks)
        finish = run.to_the_end()[1].finish
        assert finish is not None and finish.stats.reused_tokens == reused


def test_two_long_prompts_take_turns() -> None:
    run = Run(World("budget", parallel=3, cached=0, lanes=3), [Ask(text(150, 1), 1), Ask(text(150, 2), 1)])
    run.to_the_end()
    first, second = (run.outcomes[place].ended for place in (0, 1))
    assert first is not None and second is not None
    assert second - first == 1


@pytest.mark.parametrize("kind", ["plain", "budget"])
def test_a_beginning_is_read_once(kind: Any) -> None:
    """Conversations that begin alike, one after the other, each too long for what is kept of it to serve others."""
    start = text(20, 1)
    world = World(kind, parallel=1, cached=1, lanes=1)
    run = Run(world, [Ask(start + text(80, 3 + n), 4, 100 * n, shared=20) for n in range(5)])
    run.to_the_end()
    stats = [outcome.finish.stats.reused_tokens for outcome in run.outcomes.values() if outcome.finish]
    assert stats == [0, 20, 20, 20, 20]


def test_a_conversation_that_times_out_keeps_its_rows() -> None:
    first = lasting(60, timeout_s=0.3, conversation="a")
    run = Run(World("budget", parallel=1, cached=0, lanes=1), [first])
    run.to_the_end()
    outcome = run.outcomes[0]
    assert isinstance(outcome.error, RequestTimeoutError)
    assert len(run.context.sequences[0].tokens) == 5 + len(outcome.tokens) - 1
    assert run.scheduler.slots.all[0].conversation == "a"


def test_one_sequence_that_fails_in_every_step_costs_the_others_nothing() -> None:
    asks = [Ask(text(30, 1), 20), Ask((*text(30, 2), POISON), 20), Ask(text(30, 3), 20)]
    for kind in ("plain", "budget"):
        run = Run(World(kind, parallel=3, cached=0), asks)
        outcomes = run.to_the_end()
        assert isinstance(outcomes[1].error, DecodeError)
        assert outcomes[0].tokens == alone(asks[0], run.world)[0]
        assert outcomes[2].tokens == alone(asks[2], run.world)[0]


def test_closing_ends_everybody_and_the_figures_add_up() -> None:
    run = Run(World(parallel=2), [Ask(text(100, n), 50) for n in range(5)])
    for _ in range(30):
        run.tick()
    run.inbox.close()
    assert not run.scheduler.tick() or run.scheduler.running
    run.scheduler.close(EngineError("closed"))
    run.collect()
    ended = [outcome for outcome in run.outcomes.values() if outcome.ended is not None]
    assert len(ended) == 5
    counts = run.scheduler.counts
    assert counts.finished + counts.cancelled + counts.failed == 5
    assert not run.scheduler.running and not run.inbox.waiting and not run.inbox._jobs
    assert all(outcome.sampler.closed == 1 for outcome in ended)
