"""Generations without an end: rows are selected again and again, of one sequence in a step where that can be."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetContext, BudgetModel, Part
from helpers.kv_models import BUDGET, state, tokens
from helpers.stock import nmse
from ziggurat.runtime.bindings.memory import measure

PERIOD = 256 - max(BUDGET.rows)  # from a selection to the next


def selecting(context: BudgetContext, parts: list[Part]) -> list[int]:
    """Decode; return the sequences that selected before their step."""
    before = [context.rows(part.sequence) for part in parts]
    context.decode(*parts)
    return [
        part.sequence
        for part, rows in zip(parts, before, strict=True)
        if any(now != then + 1 for now, then in zip(context.rows(part.sequence), rows, strict=True))
    ]


def allocated(context: BudgetContext) -> list[tuple[int, int]]:
    return [(buffer.context, buffer.compute) for buffer in measure(context)]  # type: ignore[arg-type]


def test_one_sequence_at_a_time_selects(kv_model: BudgetModel) -> None:
    """Four that begin together and have the same tokens, in memory that does not grow."""
    n_seq, count = 4, 5 * PERIOD
    with kv_model.context(256, BUDGET, n_seq=n_seq, ubatch=64) as context:
        for sequence in range(n_seq):
            context.read(tokens(200), sequence)
        steps: list[list[int]] = [[] for _ in range(n_seq)]
        memory = []
        for step, token in enumerate(tokens(count, 1)):
            due = selecting(context, [Part(sequence, [token]) for sequence in range(n_seq)])
            assert len(due) <= 1
            for sequence in due:
                steps[sequence].append(step)
                assert min(context.capacity()) - max(context.rows(sequence)) == PERIOD - 1
            if step in (PERIOD + 2, count - 1):
                memory.append(allocated(context))
        assert memory[0] == memory[1]
        for own in steps:
            assert len(own) in (4, 5)
            assert set(np.diff(own)) == {PERIOD}
        assert context.last(3) == 200 + count - 1


def test_a_sequence_that_is_not_crowded_selects_as_if_alone(kv_model: BudgetModel) -> None:
    with kv_model.context(256, BUDGET, n_seq=4, ubatch=64) as context, \
         kv_model.context(256, BUDGET, ubatch=64) as alone:  # fmt: skip
        for sequence in range(1, 4):
            context.read(tokens(50 * sequence, sequence), sequence)
            for token in tokens(40 * sequence, sequence):
                context.read([token], sequence)
        for each in (context, alone):
            each.read(tokens(200), 0)
        for token in tokens(2 * PERIOD + 5, 1):
            logits = context.decode(*(Part(sequence, [token]) for sequence in range(4)))[0]
            assert nmse(logits, alone.read([token])) < 1e-6
            assert context.rows(0) == alone.rows(0)
        assert state(context, 0) == state(alone, 0)


@pytest.mark.parametrize("n_seq", [8, 24])
def test_more_sequences_than_room(kv_model: BudgetModel, n_seq: int) -> None:
    """Two or more have to select in one step then, and none is refused."""
    budget = Budget((250, 240, 200), slack=6)
    with kv_model.context(256, budget, n_seq=n_seq, ubatch=64) as context:
        for sequence in range(n_seq):
            context.read(tokens(255), sequence)
        counts = [
            len(selecting(context, [Part(sequence, [token]) for sequence in range(n_seq)])) for token in tokens(40)
        ]
        assert max(counts) <= n_seq // 6 + 1
        assert all(context.last(sequence) == 255 + 40 - 1 for sequence in range(n_seq))


def test_a_generation_outlives_its_context(kv_model: BudgetModel) -> None:
    """Positions go on; the first tokens and the last ones stay."""
    with kv_model.context(256, BUDGET, ubatch=64) as context:
        context.read(tokens(30))
        for token in tokens(1500, 1):
            context.read([token])
        assert context.last() == 1529
        assert all(rows <= 256 for rows in context.rows())
        for kept in context.kept():
            assert (kept[:, :2] == [0, 1]).all()
            assert (kept[:, -BUDGET.window :] == np.arange(1530 - BUDGET.window, 1530)).all()
        assert not context.remove(0, 1529 - max(context.rows()))  # beyond a selection
