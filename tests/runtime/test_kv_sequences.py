"""Several sequences with budgets in one context: batches of any mix, removal and aborts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers.kv_library import Aborted, Budget, BudgetModel, Floats, Part
from helpers.kv_models import BUDGET, alone, prompt, state, tokens
from helpers.stock import nmse

ROWS = BUDGET.rows


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


def test_steps_of_others_after_a_selection(kv_model: BudgetModel) -> None:
    """The selection's graph lies between theirs, and must not be taken for one of them."""
    budget = Budget((40, 60, 14), window=4)
    logits = []
    for together in (True, False):
        with kv_model.context(256, budget, n_seq=2, ubatch=16) as context:
            assert context.set_budget(0, (40, 6, 6)) == 0
            context.read(tokens(15), 1)
            if together:
                for token in tokens(7):
                    context.read([token], 0)
                assert context.select(0) == 2
                context.read([5], 0)
            logits.append(context.read([6], 1))
    assert np.array_equal(*logits)


def test_many_sequences(kv_model: BudgetModel) -> None:
    """As many as the library has; all take a step in one batch."""
    with kv_model.context(256, BUDGET, n_seq=256, ubatch=512, batch=512) as context:
        logits = context.decode(*(Part(sequence, [3 + sequence % 5]) for sequence in range(256)))
        for sequence in range(5, 256):
            assert nmse(logits[sequence], logits[sequence % 5]) < 1e-10
        assert all(context.rows(sequence) == (1, 1, 1) for sequence in range(256))
        context.read(tokens(200), 255)
        assert context.rows(255) == ROWS


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
