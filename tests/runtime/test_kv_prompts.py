"""Prompts that are read in steps: as in one go, with whatever else between the steps, and given up at any of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helpers.kv_library import Aborted, Budget, BudgetContext, BudgetModel, Part, Refused
from helpers.kv_models import BUDGET, Models, faults, prompt, state, tokens

PREFILLS = ("exact", "lane", "chunked")


@pytest.mark.parametrize("steps", [1, 4, 1000])
@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("types", [("f32", "f32"), ("f16", "f16")], ids="-".join)
def test_steps_equal_one_go(kv_model: BudgetModel, prefill: str, types: tuple[str, str], steps: int) -> None:
    """To the last bit: prompts of every length, one after the other in one sequence, and what is decoded after them."""
    budget = replace(BUDGET, prefill=prefill)
    options: dict[str, Any] = {"ubatch": 64, "types": types, "flash": types[1] != "f32"}
    with kv_model.context(512, budget, **options) as whole, kv_model.context(512, budget, **options) as stepped:
        for n in (20, 1, 12, 3, 40, 300, 64, 1, 200):
            text = tokens(n, n)
            assert np.array_equal(stepped.read_in_steps(text, 0, steps), whole.read(text))
            assert state(stepped, 0) == state(whole, 0)
            assert np.array_equal(stepped.read([5]), whole.read([5]))
        assert whole.select() == stepped.select()
        assert state(stepped, 0) == state(whole, 0)


def test_where_nothing_is_evicted(kv_model: BudgetModel) -> None:
    budget = Budget((512,) * 3)
    with kv_model.context(512, budget, ubatch=64) as whole, kv_model.context(512, budget, ubatch=64) as stepped:
        for n in (150, 1, 200):
            before = state(stepped, 0)
            stepped.begin(tokens(n, 9))
            stepped.step()
            assert stepped.cancel() == (n > 1)
            if n == 1:
                assert stepped.remove(0, before[0] + 1)
            assert state(stepped, 0) == before
            assert np.array_equal(stepped.read_in_steps(tokens(n)), whole.read(tokens(n)))
            assert state(stepped, 0) == state(whole, 0)
        with pytest.raises(Refused, match="exceed"):
            stepped.begin(tokens(400))


@pytest.mark.parametrize("prefill", PREFILLS)
def test_others_go_on_between_the_steps(kv_model: BudgetModel, prefill: str) -> None:
    """Steps, short prompts and selections of two others; all end as if nobody else had been there."""
    budget, others, n_text = replace(BUDGET, prefill=prefill), (0, 2), 410
    with kv_model.context(512, budget, n_seq=3, ubatch=64) as context, \
         kv_model.context(512, budget, n_seq=3, ubatch=64) as quiet:  # fmt: skip
        taken: list[list[int]] = []
        logits: list[list[np.ndarray]] = []
        for each in (context, quiet):
            for sequence in range(3):
                each.read(prompt(sequence), sequence)

        def between(done: int) -> None:
            taken.append(tokens(2, done))
            logits.append(context.decode(*(Part(s, [t]) for s, t in zip(others, taken[-1], strict=True))))
            if done == 2:
                context.remove(2)
                context.read(tokens(15), 2)
            if done == 3:
                assert context.select(0) == 3

        got = context.read_in_steps(tokens(n_text), 1, 1, between)
        for done, (step, wanted) in enumerate(zip(taken, logits, strict=True), 1):
            again = quiet.decode(*(Part(s, [t]) for s, t in zip(others, step, strict=True)))
            assert all(np.array_equal(a, b) for a, b in zip(again, wanted, strict=True))
            if done == 2:
                quiet.remove(2)
                quiet.read(tokens(15), 2)
            if done == 3:
                quiet.select(0)
        assert np.array_equal(quiet.read(tokens(n_text), 1), got)
        assert [state(context, s) for s in range(3)] == [state(quiet, s) for s in range(3)]
        assert np.array_equal(context.read([5], 1), quiet.read([5], 1))


def test_two_prompts_at_a_time(kv_model: BudgetModel) -> None:
    texts = {0: tokens(300, 1), 2: tokens(410, 2)}
    with kv_model.context(512, replace(BUDGET, n_reading=2), n_seq=4, ubatch=64) as context:
        context.read(prompt(3), 0)
        for sequence, text in texts.items():
            context.begin(text, sequence)
        with pytest.raises(Refused, match="2 prompts are being read"):
            context.begin(texts[0], 3)
        with pytest.raises(Refused, match="2 prompts are being read"):
            context.read(texts[0], 3)
        got, turn = {}, 0
        while len(got) < 2:
            sequence = (0, 2)[turn % 2]
            turn += 1
            if sequence not in got and context.step(sequence).finished:
                got[sequence] = context._logits([-1])
        with kv_model.context(512, BUDGET, n_seq=4, ubatch=64) as quiet:
            quiet.read(prompt(3), 0)
            for sequence, text in texts.items():
                assert np.array_equal(quiet.read(text, sequence), got[sequence])
                assert state(quiet, sequence) == state(context, sequence)


def test_what_is_refused_while_a_prompt_is_read(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, n_seq=2, ubatch=64) as context:
        context.read(prompt(2), 0)
        before = state(context, 0)
        context.begin(prompt(0))
        context.step()
        assert state(context, 0) == before
        for refused in (
            lambda: context.read([5]),
            lambda: context.decode(Part(1, [5]), Part(0, [6])),
            lambda: context.begin(prompt(1)),
            lambda: context.begin(prompt(0), 1),
            lambda: context.read(prompt(0), 1),
            lambda: context.step(1),
        ):
            with pytest.raises(Refused):
                refused()
        assert not context.remove(0, 100)
        assert context.select() == -1
        assert state(context, 0) == before
        while not context.step().finished:
            pass
        assert not context.cancel()
        with pytest.raises(Refused):
            context.step()
        for bad, sequence in (([], 0), ([-1], 0), ([99999], 0), (prompt(0), 2), (prompt(0), -1), (tokens(500), 0)):
            with pytest.raises(Refused):
                context.begin(bad, sequence)


@pytest.mark.parametrize("end", ["cancel", "remove", "clear"])
def test_the_end_of_a_prompt_that_is_not_read_to_its_end(kv_model: BudgetModel, end: str) -> None:
    with kv_model.context(512, BUDGET, n_seq=2, ubatch=64) as context, \
         kv_model.context(512, BUDGET, n_seq=2, ubatch=64) as quiet:  # fmt: skip
        for each in (context, quiet):
            each.read(prompt(2), 0)
        context.begin(prompt(0))
        context.step(steps=7)
        if end == "cancel":
            assert context.cancel()
        elif end == "remove":
            assert context.remove(0) and quiet.remove(0)
        else:
            context.clear(), quiet.clear()
        assert not context.cancel()
        assert state(context, 0) == state(quiet, 0)
        assert np.array_equal(context.read_in_steps(prompt(4)), quiet.read(prompt(4)))
        assert state(context, 0) == state(quiet, 0)


@pytest.mark.parametrize("prefill", PREFILLS)
def test_cancelled_after_any_step(kv_model: BudgetModel, prefill: str) -> None:
    """The sequence is as it was: its rows, its window's queries, and what it goes on with."""
    budget = replace(BUDGET, prefill=prefill)
    with kv_model.context(512, budget, ubatch=64) as context, kv_model.context(512, budget, ubatch=64) as quiet:
        for each in (context, quiet):
            each.read(prompt(0))
        context.begin(tokens(200, 1))
        count = context.step(steps=0).steps
        context.cancel()
        for done in range(count):
            context.begin(tokens(200, 1))
            context.step(steps=done)
            assert context.cancel()
            assert state(context, 0) == state(quiet, 0)
            assert np.array_equal(context.read([done]), quiet.read([done]))
        assert context.select() == quiet.select() == 3
        assert state(context, 0) == state(quiet, 0)


@pytest.mark.parametrize("steps", [1, 1000])
def test_aborted_at_any_time(kv_model: BudgetModel, steps: int) -> None:
    """Within graphs, in calls of their own and in one batch."""
    calls, limit, text = 0, 10**9, tokens(200, 1)

    def abort() -> bool:
        nonlocal calls
        calls += 1
        return calls > limit

    with kv_model.context(512, BUDGET, n_seq=2, ubatch=64, abort=abort) as context, \
         kv_model.context(512, BUDGET, n_seq=2, ubatch=64) as quiet:  # fmt: skip
        for each in (context, quiet):
            each.read(prompt(0))
        before = state(context, 0)
        calls = 0
        context.read_in_steps(prompt(0), 1)
        context.read_in_steps(text, 1)
        whole = calls // 2
        for at in np.linspace(1, whole * 0.6, 25):
            calls, limit = 0, int(at)
            with pytest.raises(Aborted):
                context.read_in_steps(text, 0, steps) if steps == 1 else context.read(text)
            assert state(context, 0) == before
            assert not context.cancel()
        limit = 10**9
        assert np.array_equal(context.read([7]), quiet.read([7]))
        assert np.array_equal(context.read_in_steps(text), quiet.read(text))
        assert state(context, 0) == state(quiet, 0)


@pytest.mark.parametrize("way", ["one go", "steps"])
@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("text", [[7], tokens(12), tokens(30, 2), tokens(200, 3)], ids=len)
def test_faults_while_a_prompt_is_read(kv_model: BudgetModel, prefill: str, way: str, text: list[int]) -> None:
    """At every allocation and computation: the sequence is as it was before, and the next try reads it."""
    budget = replace(BUDGET, prefill=prefill, n_reading=2)
    with kv_model.context(512, budget, n_seq=3, ubatch=64) as context, \
         kv_model.context(512, budget, n_seq=3, ubatch=64) as quiet:  # fmt: skip
        for first in ([], prompt(3), prompt(2)):
            for each in (context, quiet):
                each.clear()
                each.read(prompt(2), 0)
                if first:
                    each.read(first, 1)
            before = [state(quiet, s) for s in range(3)]

            def run(context: BudgetContext) -> None:
                context.read_in_steps(text, 1) if way == "steps" else context.read(text, 1)

            def check(wanted: object = before) -> None:
                assert [state(context, s) for s in range(3)] == wanted
                assert not context.cancel(1)

            assert faults(run, context, check) >= 1
            quiet.read(text, 1)
            assert [state(context, s) for s in range(3)] == [state(quiet, s) for s in range(3)]
            for each in (context, quiet):
                each.set_budget(1, (12, 12, 12))
            assert context.select(1) == quiet.select(1)  # by the ring's queries
            assert [state(context, s) for s in range(3)] == [state(quiet, s) for s in range(3)]
            assert np.array_equal(context.read([5], 1), quiet.read([5], 1))
            for each in (context, quiet):
                each.set_budget(1, None)


def test_faults_in_a_batch_of_everything(kv_model: BudgetModel) -> None:
    """Steps, a short prompt and two long ones: each sequence is as before, or has all of its tokens."""
    with kv_model.context(512, BUDGET, n_seq=5, ubatch=64) as context, \
         kv_model.context(512, BUDGET, n_seq=5, ubatch=64) as quiet:  # fmt: skip
        parts = [Part(0, [5]), Part(1, tokens(300, 1)), Part(2, tokens(20)), Part(3, [6]), Part(4, tokens(200, 2))]
        for each in (context, quiet):
            for sequence in (0, 1, 3):
                each.read(prompt(sequence), sequence)
        before = [state(quiet, s) for s in range(5)]
        quiet.decode(*parts)
        after = [state(quiet, s) for s in range(5)]
        seen = set()

        def check() -> None:
            now = [state(context, s) for s in range(5)]
            assert all(have in (b, a) for have, b, a in zip(now, before, after, strict=True))
            finished = [part.sequence for part in parts if now[part.sequence] == after[part.sequence]]
            seen.add(tuple(finished))
            for sequence in finished:
                context.remove(sequence)
                if before[sequence][0] >= 0:
                    context.read(prompt(sequence), sequence)
            assert [state(context, s) for s in range(5)] == before

        assert faults(lambda context: context.decode(*parts), context, check) > 10
        assert seen == {(), (1,)}  # the first prompt was finished when the second failed
        assert [state(context, s) for s in range(5)] == after


def test_faults_in_a_selection(kv_model: BudgetModel) -> None:
    """One that is asked for, and one that a step needs."""
    with kv_model.context(512, BUDGET, ubatch=64) as context, kv_model.context(512, BUDGET, ubatch=64) as quiet:
        for each in (context, quiet):
            each.read(prompt(0))
            for token in tokens(20):
                each.read([token])
        before = state(context, 0)

        def unchanged() -> None:
            assert state(context, 0) == before

        def select(context: BudgetContext) -> None:
            if context.select() == -2:
                assert context.refusal
                raise RuntimeError

        assert faults(select, context, unchanged) >= 4
        quiet.select()
        assert state(context, 0) == state(quiet, 0)
        room = min(c - u for c, u in zip(context.capacity(), context.rows(), strict=True))
        for token in tokens(room, 1):
            assert np.array_equal(context.read([token]), quiet.read([token]))
        before, selected = state(context, 0), False
        wanted = quiet.read([5])

        def as_before_or_selected() -> None:
            nonlocal selected
            if context.rows() == BUDGET.rows:  # the selection was done, the step was not
                selected = True
            else:
                unchanged()
                assert not selected

        assert faults(lambda context: context.read([5]), context, as_before_or_selected) >= 4
        assert selected
        assert state(context, 0) == state(quiet, 0)
        assert np.array_equal(context.read([6]), quiet.read([6]))
        assert wanted.shape


@pytest.mark.parametrize("types", [("f16", "f32"), ("f32", "f16"), ("f16", "f16")], ids="-".join)
def test_layers_of_different_widths_share_a_stage(kv_files: Models, types: tuple[str, str]) -> None:
    """Neither takes another prompt's rows for its own, nor V of one layer for K of the next one."""
    texts = {0: tokens(410, 1), 2: tokens(300, 2)}  # the second is in a narrower layer while the first is in a wide one
    with BudgetModel(kv_files["uneven"]) as model, \
         model.context(512, replace(BUDGET, n_reading=2), n_seq=3, ubatch=64, types=types) as context, \
         model.context(512, BUDGET, n_seq=3, ubatch=64, types=types) as quiet:  # fmt: skip
        for sequence, text in texts.items():
            context.begin(text, sequence)
        got: dict[int, np.ndarray] = {}
        for turn in range(60):
            sequence = (0, 2)[turn % 2]
            if sequence not in got and context.step(sequence).finished:
                got[sequence] = context._logits([-1])
        for sequence, text in texts.items():
            assert np.isfinite(got[sequence]).all()
            assert np.array_equal(got[sequence], quiet.read(text, sequence))
            assert state(context, sequence) == state(quiet, sequence)


def test_without_copies_only_empty_sequences_read_prompts(kv_model: BudgetModel) -> None:
    """A prompt that follows on another is refused; few tokens, which the ring can take back, are not."""
    budget = replace(BUDGET, n_reading=2, n_copies=1)
    with kv_model.context(512, replace(BUDGET, n_copies=0), n_seq=3, ubatch=64) as context:
        context.read_in_steps(prompt(0))
        before = state(context, 0)
        for refused in (context.begin, context.read):
            with pytest.raises(Refused, match="no room for a copy"):
                refused(prompt(0))
        assert state(context, 0) == before
        context.read([5])
    with kv_model.context(512, budget, n_seq=3, ubatch=64) as context:
        context.read(prompt(2), 0)
        context.begin(prompt(0), 1)  # leaves the copy to those who need it
        context.begin(prompt(0), 0)
        assert context.cancel(1)
        context.read(prompt(2), 1)
        with pytest.raises(Refused, match="1 prompts are being read"):
            context.begin(prompt(0), 1)
