"""What a context with a budget takes back, and what it refuses: with a reason, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetContext, BudgetModel, Part, Refused
from helpers.kv_models import BUDGET, Models, alone, prompt, state, tokens
from helpers.kv_reference import RING_SPARE, ReferenceSequence, Weights
from helpers.stock import nmse

ROWS = BUDGET.rows


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


def test_a_rollback_of_a_few_tokens_leaves_a_whole_window(kv_model: BudgetModel) -> None:
    """As many as the ring has beyond the window: what is selected is what would have been without them."""
    with kv_model.context(512, BUDGET, ubatch=64) as context, kv_model.context(512, BUDGET, ubatch=64) as fresh:
        for each in (context, fresh):
            each.read(prompt(0))
            for token in tokens(20, 1):
                each.read([token])
        for token in tokens(RING_SPARE, 2):
            context.read([token])
        assert context.remove(0, 320)
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
        assert context.remove(0, 340 - 20)
        reference.forget(20)
        assert context.select() == 3
        for layer in range(3):
            reference.swaps(layer, context.positions(layer), 1e-4)


def test_a_selection_without_queries_is_refused(kv_model: BudgetModel) -> None:
    """All that the ring held were rolled back; tokens read after that bring new ones."""
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(prompt(0))
        for token in tokens(50, 1):
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
            lambda: context.shift(0, 10, 20, 5),
            lambda: context.shift(0, -1, -1, -1),
            lambda: context.divide(0, 0, 100, 2),
        ]
        for operation in operations:
            operation()
            assert context.refusal
            assert [state(context, sequence) for sequence in range(3)] == before
        assert not context.can_shift
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


def test_nothing_is_selected_where_all_rows_fit(kv_model: BudgetModel) -> None:
    """Then there is nothing to select by: a smaller budget of one sequence is refused."""
    with kv_model.context(256, Budget((256, 256, 256)), n_seq=2) as context:
        context.read(tokens(100))
        assert context.set_budget(0, ROWS) != 0
        assert context.select() == 0
        assert context.rows() == (100,) * 3
        with pytest.raises(Refused):
            context.read(tokens(200))
        assert context.rows() == (100,) * 3
