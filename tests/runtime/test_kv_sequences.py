"""Several sequences with budgets in one context: batches of any mix, removal, rollback, aborts and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helpers.kv_library import Aborted, Budget, BudgetContext, BudgetModel, Floats, Ints, Part, Refused
from helpers.kv_models import Models, tokens
from helpers.kv_reference import ReferenceSequence, Weights
from helpers.stock import nmse

ROWS = (40, 64, 24)
BUDGET = Budget(ROWS)


def prompt(sequence: int) -> list[int]:
    """Of every length: below all budgets, between them, above."""
    return tokens((300, 20, 150, 50, 410, 7, 90, 64)[sequence % 8], 100 + sequence)


def state(context: BudgetContext, sequence: int) -> tuple[int, tuple[int, ...], list[list[list[int]]]]:
    return context.last(sequence), context.rows(sequence), [kept.tolist() for kept in context.kept(sequence)]


def alone(kv_model: BudgetModel, sequence: int, steps: list[int], **options: Any) -> tuple[list[Floats], list[Ints]]:
    """A sequence's prompt and single steps in a context of its own."""
    with kv_model.context(512, BUDGET, **options) as context:
        logits = [context.read(prompt(sequence))]
        logits += [context.read([token]) for token in steps]
        return logits, context.kept()


@pytest.mark.parametrize("flash", [False, True])
def test_eight_interleaved_sequences_are_eight_separate_ones(kv_model: BudgetModel, flash: bool) -> None:
    """One starts in every batch while the others go on; after its last step each has the logits and rows it has alone.

    Steps of several sequences in one batch may be computed by other kernels, hence a tolerance; no score is nearer to
    another one than that here.
    """
    options: dict[str, Any] = {"flash": flash, "ubatch": 64}
    steps = {sequence: tokens(20 - sequence, 200 + sequence) for sequence in range(8)}
    got: dict[int, list[Floats]] = {sequence: [] for sequence in range(8)}
    with kv_model.context(512, BUDGET, n_seq=8, **options) as context:
        for turn in range(24):
            parts = [Part(turn, prompt(turn))] if turn < 8 else []
            parts += [Part(s, steps[s][len(got[s]) - 1 :][:1]) for s in range(8) if 0 < len(got[s]) <= len(steps[s])]
            parts = (
                parts[turn % max(len(parts), 1) :] + parts[: turn % max(len(parts), 1)]
            )  # prompts first, last, within
            if parts:
                for part, logits in zip(parts, context.decode(*parts), strict=True):
                    got[part.sequence].append(logits)
        kept = [context.kept(sequence) for sequence in range(8)]
    for sequence in range(8):
        wanted, rows = alone(kv_model, sequence, steps[sequence], **options)
        assert len(got[sequence]) == len(wanted)
        assert max(nmse(a, b) for a, b in zip(got[sequence], wanted, strict=True)) < 1e-6
        assert all(np.array_equal(a, b) for a, b in zip(kept[sequence], rows, strict=True))


def test_tokens_of_sequences_may_stand_in_any_order(kv_model: BudgetModel) -> None:
    """Two prompts token by token in turns, and a step of a third."""
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
        context.read(prompt(3), 2)
        a, b = tokens(150, 1), tokens(150, 2)
        parts = [Part(i % 2, [(a, b)[i % 2][i // 2]]) for i in range(300)]
        logits = context.decode(*parts[:150], Part(2, [5]), *parts[150:])
        kept = [context.kept(sequence) for sequence in range(3)]
    for sequence, text, index in ((0, a, -2), (1, b, -1)):
        with kv_model.context(512, BUDGET, ubatch=64) as single:
            assert nmse(logits[index], single.read(text)) < 1e-6
            assert all(np.array_equal(x, y) for x, y in zip(kept[sequence], single.kept(), strict=True))
    assert nmse(logits[150], alone(kv_model, 3, [5])[0][1]) < 1e-6


def test_removed_sequences_leave_room_and_the_others_alone(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
        for sequence in range(3):
            context.read(prompt(sequence), sequence)
        before = state(context, 0), state(context, 2)
        assert context.remove(1)
        assert (context.last(1), context.rows(1)) == (-1, (0, 0, 0))
        assert (state(context, 0), state(context, 2)) == before
        got = context.decode(Part(1, prompt(4)), Part(0, [5]), Part(2, [6]))
        assert nmse(got[0], alone(kv_model, 4, [])[0][0]) < 1e-6
        assert nmse(got[1], alone(kv_model, 0, [5])[0][1]) < 1e-6
        assert nmse(got[2], alone(kv_model, 2, [6])[0][1]) < 1e-6
        context.clear()
        assert [context.last(sequence) for sequence in range(3)] == [-1] * 3
        assert np.array_equal(context.read(prompt(0), 2), alone(kv_model, 0, [], ubatch=64)[0][0])


def test_rollback_of_generated_tokens_is_exact(kv_model: BudgetModel, kv_files: Models) -> None:
    """Other tokens in their place give what they give in a context that never saw the first ones."""
    steps = tokens(30, 1)
    with kv_model.context(512, BUDGET, ubatch=64) as context, kv_model.context(512, BUDGET, ubatch=64) as fresh:
        for each in (context, fresh):
            each.read(prompt(0))
            for token in steps[:4]:
                each.read([token])
        for token in tokens(9, 2):
            context.read([token])
        assert context.remove(0, 304)
        assert state(context, 0) == state(fresh, 0)
        for token in steps[4:]:
            assert np.array_equal(context.read([token]), fresh.read([token]))
        assert state(context, 0) == state(fresh, 0)  # the last window's queries are all new
        assert context.select() == fresh.select() == 3
        assert state(context, 0) == state(fresh, 0)


def test_a_selection_after_a_rollback_uses_the_queries_it_has(kv_model: BudgetModel, kv_files: Models) -> None:
    reference = ReferenceSequence(Weights(kv_files["gqa"]), BUDGET)
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        for text in (prompt(0), *([token] for token in tokens(40, 1))):
            context.read(text)
            reference.read(text)
            if len(text) > 1:
                reference.select(context.kept())
        assert context.remove(0, 340 - 5)
        reference.forget(5)
        assert context.select() == 3
        for layer in range(3):
            reference.swaps(layer, context.positions(layer), 1e-4)


def test_a_selection_without_queries_is_refused(kv_model: BudgetModel) -> None:
    """All of the window's queries were rolled back; tokens read after that bring new ones."""
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(prompt(0))
        for token in tokens(30, 1):
            context.read([token])
        assert context.remove(0, 310)
        before = state(context, 0)
        assert context.select() == -1
        assert "queries" in context.refusal
        assert state(context, 0) == before
        context.read([5])
        assert context.select() == 3
        assert context.rows() == ROWS


def test_rollback_beyond_a_selection_is_refused(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(prompt(0))
        for token in tokens(5, 1):
            context.read([token])
        before = state(context, 0)
        for start, end in ((299, -1), (100, -1), (0, 100), (302, 303), (1, -1)):
            assert not context.remove(0, start, end)
            assert context.refusal
            assert state(context, 0) == before
        assert context.remove(0, 305, -1)  # nothing is there
        assert context.remove(0, 400, 500)
        assert state(context, 0) == before
        assert context.remove(0, 302, 305)
        assert context.last() == 301
        assert context.remove(0, 300, 1000)
        assert (context.last(), context.rows()) == (299, ROWS)
        assert context.remove(0, 0, -1)
        assert context.last() == -1


def test_rollback_of_an_unevicted_prompt(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(tokens(20))
        assert context.remove(0, 12)
        assert context.rows() == (12, 12, 12)
        with kv_model.context(512, BUDGET, ubatch=64) as fresh:
            fresh.read(tokens(12))
            assert nmse(context.read([7]), fresh.read([7])) < 1e-10


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("mixed", [False, True])
def test_abort_in_the_middle_of_a_prompt(kv_model: BudgetModel, share: float, mixed: bool) -> None:
    """The prompt's sequence is empty, the others are as they were or a step further, and all can be used."""
    calls, limit = 0, 10**9

    def abort() -> bool:
        nonlocal calls
        calls += 1
        return calls > limit

    parts = [Part(1, prompt(0)), *([Part(0, [5])] if mixed else [])]
    with kv_model.context(512, BUDGET, n_seq=2, ubatch=64, abort=abort) as context:
        context.read(prompt(2), 0)
        calls = 0
        context.decode(*parts)
        whole = calls
        context.clear()
        wanted = context.read(prompt(2), 0)
        before = state(context, 0)
        calls, limit = 0, int(whole * share)
        with pytest.raises(Aborted):
            context.decode(*parts)
        limit = 10**9
        assert (context.last(1), context.rows(1)) == (-1, (0, 0, 0))
        if context.last(0) != before[0]:  # its step may have been computed before the prompt
            assert mixed
            assert context.remove(0, before[0] + 1)
        assert state(context, 0) == before
        logits = context.read([5], 0), context.read(prompt(0), 1), context.read([6], 1)
        assert context.remove(0)
        assert np.array_equal(context.read(prompt(2), 0), wanted)
    assert nmse(logits[0], alone(kv_model, 2, [5])[0][1]) < 1e-6
    for got, expected in zip(logits[1:], alone(kv_model, 0, [6], ubatch=64)[0], strict=True):
        assert np.array_equal(got, expected)


def test_abort_of_a_step(kv_model: BudgetModel) -> None:
    calls, limit = 0, 10**9

    def abort() -> bool:
        nonlocal calls
        calls += 1
        return calls > limit

    with kv_model.context(512, BUDGET, n_seq=2, ubatch=64, abort=abort) as context:
        for sequence in range(2):
            context.read(prompt(sequence), sequence)
        before = [state(context, sequence) for sequence in range(2)]
        calls, limit = 0, 10
        with pytest.raises(Aborted):
            context.decode(Part(0, [5]), Part(1, [6]))
        limit = 10**9
        assert [state(context, sequence) for sequence in range(2)] == before
        got = context.decode(Part(0, [5]), Part(1, [6]))
    for sequence, token in ((0, 5), (1, 6)):
        assert nmse(got[sequence], alone(kv_model, sequence, [token])[0][1]) < 1e-6


REFUSED: dict[str, Callable[[BudgetContext], object]] = {
    "a hole": lambda c: c.decode(Part(0, [5], 310)),
    "a position again": lambda c: c.decode(Part(0, [5], 299)),
    "rows instead of tokens": lambda c: c.decode(Part(0, [5], 40)),
    "a hole in a prompt": lambda c: c.decode(Part(1, tokens(5), 20), Part(1, tokens(5), 30)),
    "an empty sequence that starts late": lambda c: c.decode(Part(2, tokens(5), 3)),
    "more rows than the stage has": lambda c: c.decode(Part(0, tokens(500))),
    "one of two": lambda c: c.decode(Part(1, [5]), Part(0, [5], 310)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_batches_change_nothing(kv_model: BudgetModel, name: str) -> None:
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
        context.read(prompt(0), 0)
        context.read(prompt(1), 1)
        before = [state(context, sequence) for sequence in range(3)]
        with pytest.raises((Refused, RuntimeError)) as refusal:
            REFUSED[name](context)
        if isinstance(refusal.value, Refused):
            assert len(str(refusal.value)) > 10
            assert "status" not in str(refusal.value)
        assert [state(context, sequence) for sequence in range(3)] == before
        assert np.array_equal(context.read([5], 0), alone(kv_model, 0, [5], ubatch=64)[0][1])
        assert context.refusal == ""


def test_refused_operations_change_nothing(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
        context.read(prompt(0), 0)
        before = [state(context, sequence) for sequence in range(3)]
        operations: list[Callable[[], object]] = [
            lambda: context.copy(0, 1),
            lambda: context.shift(0, 10, 20, 5),
            lambda: context.shift(0, -1, -1, -1),
            lambda: context.divide(0, 0, 100, 2),
        ]
        for operation in operations:
            operation()
            assert context.refusal
            assert [state(context, sequence) for sequence in range(3)] == before
        assert not context.can_shift
        assert context.saved_bytes(0) == 0
        assert context.saved_bytes() == 0
        for sequence in (-1, 3, 99):
            assert context.rows(sequence) == ()
            assert context.select(sequence) == -1
        assert np.array_equal(context.read([5], 0), alone(kv_model, 0, [5], ubatch=64)[0][1])


@pytest.mark.parametrize(
    "budget",
    [
        Budget(ROWS[:2]),
        Budget((*ROWS, 40)),
        Budget((40, 9, 24)),  # below window and sinks
        Budget((0, 40, 24)),
        Budget(ROWS, window=0),
        Budget(ROWS, pool=4),
        Budget(ROWS, pool=0),
        Budget(ROWS, slack=0),
    ],
    ids=str,
)
def test_budgets_that_cannot_be(kv_model: BudgetModel, budget: Budget) -> None:
    with pytest.raises(Refused):
        kv_model.context(512, budget)


def test_a_budget_of_nothing_but_window_and_sinks(kv_model: BudgetModel) -> None:
    least = (BUDGET.window + BUDGET.sinks,) * 3
    for budget, own in ((Budget(least), None), (BUDGET, least)):
        with kv_model.context(512, budget, ubatch=64) as context:
            assert context.set_budget(0, own) == 0
            for text in (tokens(24), tokens(300)):
                context.read(text)
                assert context.select() >= 0
                assert context.rows() == least
            wanted = [0, 1, *range(324 - BUDGET.window, 324)]
            assert all((kept == wanted).all() for kept in context.kept())


@pytest.mark.parametrize("n_seq", [1, 4])
def test_a_ubatch_may_be_larger_than_a_context(kv_model: BudgetModel, n_seq: int) -> None:
    with kv_model.context(256, BUDGET, n_seq=n_seq, ubatch=2048) as context:
        context.read(tokens(250))
        with kv_model.context(256, BUDGET, ubatch=64) as other:
            other.read(tokens(250))
            assert state(context, 0) == state(other, 0)


def test_threads_do_not_matter(kv_model: BudgetModel) -> None:
    wanted, kept = alone(kv_model, 4, tokens(10), ubatch=64)
    got, other = alone(kv_model, 4, tokens(10), ubatch=64, threads=3)
    assert max(nmse(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-6
    assert all(np.array_equal(a, b) for a, b in zip(kept, other, strict=True))
