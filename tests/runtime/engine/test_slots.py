from __future__ import annotations

from typing import Any

import pytest

from helpers.fake_library import Clock, FakeContext, FakeSampler, Fault
from ziggurat.runtime.engine.admission import Job
from ziggurat.runtime.engine.generation import Generation
from ziggurat.runtime.engine.protocol import GenerationRequest
from ziggurat.runtime.engine.rates import Rate, Typical
from ziggurat.runtime.engine.slots import Slots
from ziggurat.runtime.errors import ContextError


def make(kind: Any = "budget", n_seq: int = 3) -> tuple[Slots, FakeContext]:
    context = FakeContext(Clock(), kind=kind, n_seq=n_seq)
    library: Any = context
    return Slots(library), context


def fill(slots: Slots, context: FakeContext, index: int, tokens: list[int]) -> None:
    slot = slots.all[index]
    if context.kv_active:
        context.prompt_begin(index, tokens)
        while not context.prompt_step(index, 1).finished:
            pass
    else:
        context._append(index, tokens)
    slot.tokens += tokens
    slots.measure(slot)
    slots.touch(slot)


def job(tokens: list[int], **values: Any) -> Job:
    sampler: Any = FakeSampler()
    return Job(GenerationRequest(tokens=tuple(tokens), **values), tokens, sampler, 0.0)


TEXT = [1 + n % 50 for n in range(200)]


@pytest.mark.parametrize("kind", ["budget", "plain"])
def test_a_beginning_is_continued_cut_or_copied(kind: Any) -> None:
    slots, context = make(kind)
    fill(slots, context, 0, TEXT[:20])
    slot, reused = slots.prepare(job(TEXT[:40]))
    assert (slot.index, reused) == (0, 20)
    slot, reused = slots.prepare(job(TEXT[:17] + [50, 51]))
    assert (slot.index, reused) == (0, 17)
    assert context.sequences[0].tokens == slot.tokens == TEXT[:17]
    fill(slots, context, 0, TEXT[17:24])
    other = slots.all[1]
    slots.keep_apart(slots.all[0])
    apart = slots.all[2]
    assert apart.apart and context.sequences[2].tokens == TEXT[:24]
    slots.keep_apart(slots.all[0])  # it is there already
    assert not other.tokens


def test_what_was_evicted_from_cannot_be_cut_and_is_cleared() -> None:
    slots, context = make()
    fill(slots, context, 0, TEXT[:100])
    assert slots.all[0].removable_from == 100
    assert slots.all[0].evicted == 200 - (40 + 24)
    slots.all[0].budgets = context.sequences[0].budget
    slots.cut(slots.all[0], 50)
    assert slots.all[0].tokens == context.sequences[0].tokens == []
    assert slots.all[0].budgets == ()


@pytest.mark.parametrize("error", [ContextError("no"), RuntimeError("a bug")])
@pytest.mark.parametrize("at", [0, 1])
def test_a_copy_that_fails_leaves_an_empty_sequence(error: Exception, at: int) -> None:
    """At once, or when it is looked at."""
    slots, context = make()
    fill(slots, context, 0, TEXT[:20] + TEXT[100:150])
    slots.all[0].removable_from = 0
    held = context.sequences[0]
    held.used, held.fixed = [70, 70], [0, 0]
    slots.all[1].tokens = []
    context.faults = {context.calls + at: Fault(0, error)}
    if isinstance(error, ContextError):
        assert slots.prepare(job(TEXT[:30])) == (slots.all[1], 0)
    else:
        with pytest.raises(RuntimeError):
            slots.prepare(job(TEXT[:30]))
    assert slots.all[1].tokens == context.sequences[1].tokens == []


def test_a_name_is_of_the_sequence_used_last() -> None:
    slots, context = make()
    fill(slots, context, 0, TEXT[:30])
    slots.name(slots.all[0], "a")
    slots.name(slots.all[1], "a")
    assert [slot.conversation for slot in slots.all] == [None, "a", None]
    slots.name(slots.all[2], None)
    assert slots.all[1].conversation == "a"


def test_no_more_rows_than_the_context_has() -> None:
    slots, context = make()
    slots.set_budget(slots.all[0], (1000, 16))
    assert slots.all[0].budgets == context.sequences[0].budget == (40, 16)


def test_a_rate_is_of_the_last_seconds_of_work() -> None:
    rate = Rate(span=1.0)
    assert rate.per_second == 0
    rate.record(10, 1.0)
    assert rate.per_second == pytest.approx(10)
    for _ in range(20):
        rate.record(40, 1.0)
    assert rate.per_second == pytest.approx(40, rel=0.01)


def test_what_is_typical_is_not_moved_by_one_that_is_not() -> None:
    typical = Typical(count=5)
    assert typical.seconds == 0
    for seconds in (1.0, 1.0, 50.0, 1.0, 2.0):
        typical.record(seconds)
    assert typical.seconds == 1.0
    for _ in range(3):
        typical.record(7.0)
    assert typical.seconds == 7.0


def run_on(slots: Slots, index: int) -> None:
    """Let a request run there."""
    running: Any = object.__new__(Generation)
    running.pending = 1
    slots.all[index].generation = running


def held(slots: Slots, context: FakeContext) -> list[list[int]]:
    assert [sequence.tokens for sequence in context.sequences] == [slot.tokens for slot in slots.all]
    return [slot.tokens for slot in slots.all]


@pytest.mark.parametrize("kind", ["budget", "plain"])
def test_requests_run_side_by_side_and_what_stood_there_moves(kind: Any) -> None:
    slots, context = make(kind, 5)
    texts = [[place + 1, *TEXT[: 20 + place]] for place in range(5)]
    for place in (4, 1, 0, 2, 3):  # the last one was used longest ago
        fill(slots, context, place, texts[place])
    slots.all[1].conversation = "one"
    run_on(slots, 0)
    slot, reused = slots.prepare(job([49, 48, 47]))  # nothing is like it: 4 goes, and 1, beside 0, moves there
    assert (slot.index, reused) == (1, 0)
    assert held(slots, context) == [texts[0], [], texts[2], texts[3], texts[1]]
    assert slots.all[4].conversation == "one"


@pytest.mark.parametrize("kind", ["budget", "plain"])
def test_what_goes_on_moves_beside_those_in_use(kind: Any) -> None:
    slots, context = make(kind, 5)
    texts = [[place + 1, *TEXT[: 20 + place]] for place in range(5)]
    for place in (4, 1, 0, 2, 3):
        fill(slots, context, place, texts[place])
    run_on(slots, 0)
    slot, reused = slots.prepare(job([*texts[3], 7, 8], conversation="three"))
    assert (slot.index, reused) == (1, len(texts[3]))
    assert held(slots, context) == [texts[0], texts[3], texts[2], [], texts[1]]  # 4 was used longest ago
    assert slots.all[1].conversation == "three"


@pytest.mark.parametrize("kind", ["budget", "plain"])
def test_a_copy_of_what_has_to_move_is_of_where_it_is_then(kind: Any) -> None:
    slots, context = make(kind, 3)
    fill(slots, context, 2, [40, *TEXT[:30]])
    fill(slots, context, 1, TEXT[:22])
    run_on(slots, 0)
    slots.all[1].apart = True
    slot, reused = slots.prepare(job([*TEXT[:18], 50]))
    assert (slot.index, reused) == (1, 18)
    assert held(slots, context) == [[], TEXT[:18], TEXT[:22]]
    assert slots.all[2].apart and not slots.all[1].apart
