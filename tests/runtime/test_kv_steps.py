"""Decoding steps of several tokens, as drafts are: they give what single ones would, and their end can be removed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.kv_library import Aborted, Budget, BudgetContext, BudgetModel, Floats, Part, Refused
from helpers.kv_models import BUDGET, Models, faults, prompt, state, tokens
from helpers.kv_reference import ReferenceSequence, Weights
from helpers.stock import nmse
from ziggurat.runtime.bindings.memory import measure

MOST = 16
#: Of 256 rows each: the second layer has room for 16 tokens after a selection.
TIGHT = Budget((230, 240, 200), slack=16)
PREFILLS = ("exact", "chunked", "lane")


def room(context: BudgetContext, sequence: int = 0) -> int:
    return min(most - rows for most, rows in zip(context.capacity(), context.rows(sequence), strict=True))


def take_step(context: BudgetContext, reference: ReferenceSequence, text: list[int], sequence: int = 0) -> bool:
    """A step of the context and of the reference; whether rows were selected before it, as they have to be."""
    assert reference.budget is not None
    held, due = context.rows(sequence), room(context, sequence) < len(text)
    logits = context.read(text, sequence, every=True)
    if due:
        held = tuple(min(pair) for pair in zip(held, reference.budget.rows, strict=True))
        kept = [positions[:, : -len(text)] for positions in context.kept(sequence)]
        for layer, positions in enumerate(kept):
            reference.swaps(layer, positions, 1e-4)
        reference.select(kept)
    assert context.rows(sequence) == tuple(rows + len(text) for rows in held)
    assert nmse(logits, reference.read(text).astype(np.float32)) < 1e-6
    return due


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("n", range(1, MOST + 1))
def test_against_the_reference(kv_model: BudgetModel, kv_files: Models, n: int, prefill: str) -> None:
    """Several selections; of every step some tokens are removed, each time as many more."""
    budget = replace(TIGHT, prefill=prefill)
    reference = ReferenceSequence(Weights(kv_files["gqa"]), budget)
    selections = 0
    with kv_model.context(256, budget, ubatch=64) as context:
        assert context.set_step(MOST) == 0
        context.read(tokens(190))
        reference.read(tokens(190))
        for turn in range(10 + 130 // n):
            selections += take_step(context, reference, tokens(n, turn))
            assert context.removable_from() <= reference.n - n
            wrong = turn % n
            assert context.remove(0, reference.n - wrong)
            reference.forget(wrong)
            for kept, rows in zip(context.kept(), reference.layers, strict=True):
                assert np.array_equal(kept, rows.positions)
    assert selections >= 2


def in_steps(context: BudgetContext, text: list[int], n: int) -> Floats:
    return np.concatenate([context.read(text[at : at + n], every=True) for at in range(0, len(text), n)])


@pytest.mark.parametrize("ubatch", [4, 64])
@pytest.mark.parametrize("n", range(2, MOST + 1))
def test_equals_single_tokens(kv_model: BudgetModel, n: int, ubatch: int) -> None:
    """Rows and logits; and what is selected when some were removed, also by a window that is shorter than the step."""
    text = tokens(4 * n, 1)
    with kv_model.context(512, BUDGET, ubatch=ubatch) as context, \
         kv_model.context(512, BUDGET, ubatch=64) as single:  # fmt: skip
        assert context.set_step(n) == 0
        for removed in {0, 1, n // 2, n - 1, n}:
            for each in (context, single):
                each.clear()
                each.read(prompt(0))
            wanted = in_steps(single, text, 1)
            assert nmse(in_steps(context, text, n), wanted) < 1e-6
            assert state(context, 0) == state(single, 0)
            for each in (context, single):
                assert each.removable_from() == 300
                assert each.remove(0, 300 + len(text) - removed)
            assert state(context, 0) == state(single, 0)
            assert context.select() == single.select() == 3
            assert state(context, 0) == state(single, 0)
            assert nmse(context.read([7]), single.read([7])) < 1e-6


@pytest.mark.parametrize("score", ["snapkv", "tova", "h2o"])
@pytest.mark.parametrize("n", [2, 8, MOST])
def test_wrong_drafts_leave_no_trace(kv_model: BudgetModel, n: int, score: str) -> None:
    """Of steps of one shape, with other drafts that are removed: the same to the last bit, selections included."""
    budget = replace(TIGHT, score=score)
    with kv_model.context(256, budget, ubatch=64) as context, kv_model.context(256, budget, ubatch=64) as other:
        for each in (context, other):
            each.set_step(n)
            each.read(tokens(250))
        for turn in range(2 * MOST):
            logits = []
            for seed, each in enumerate((context, other)):
                drafts = tokens(n - 1, 2 * turn + seed)
                logits.append(each.read([5 + turn, *drafts], every=True)[0])
                assert each.remove(0, 250 + turn + 1)
            assert np.array_equal(*logits)
            assert state(context, 0) == state(other, 0)
        assert context.last() == 250 + 2 * MOST - 1


def test_a_selection_comes_before_the_step_that_does_not_fit(kv_model: BudgetModel) -> None:
    """Where single tokens would fill the layer first; without the step it is as if it had been asked for."""
    with kv_model.context(256, TIGHT, ubatch=64) as context, kv_model.context(256, TIGHT, ubatch=64) as asked:
        for each in (context, asked):
            each.set_step(MOST)
            each.read(tokens(250))
            each.read(tokens(13, 1))
        assert room(context) == 3
        context.read(tokens(4, 2))
        assert context.rows() == tuple(rows + 4 for rows in TIGHT.rows)
        assert context.removable_from() == 263
        assert not context.remove(0, 262)
        assert context.remove(0, 263)
        assert asked.select() == 3
        assert state(context, 0) == state(asked, 0)
        assert np.array_equal(context.read(tokens(3, 3)), asked.read(tokens(3, 3)))


def test_steps_of_every_length_and_prompts_in_one_batch(kv_model: BudgetModel) -> None:
    """Each sequence as in a context of its own."""
    lengths = {0: 3, 1: MOST, 2: 1, 3: 7}
    with kv_model.context(256, TIGHT, n_seq=6, ubatch=64) as context:
        context.set_step(MOST)
        got: dict[int, list[Floats]] = {sequence: [] for sequence in lengths}
        context.decode(*(Part(sequence, tokens(190 + 3 * sequence, sequence)) for sequence in lengths))
        for turn in range(10):
            parts = [Part(sequence, tokens(n, 10 * turn + sequence)) for sequence, n in lengths.items()]
            others = [Part(4, prompt(turn)[:256])] if turn % 2 else [Part(5, [5])]
            results = context.decode(*parts[:2], *others, *parts[2:], every=True)
            for sequence, logits in zip(lengths, results[:2] + results[-2:], strict=True):
                got[sequence].append(logits)
            context.remove(4)
        kept = {sequence: state(context, sequence) for sequence in lengths}
    for sequence, n in lengths.items():
        with kv_model.context(256, TIGHT, ubatch=64) as alone:
            alone.set_step(MOST)
            alone.read(tokens(190 + 3 * sequence, sequence))
            for turn, logits in enumerate(got[sequence]):
                assert nmse(logits, alone.read(tokens(n, 10 * turn + sequence), every=True)) < 1e-6
            assert state(alone, 0) == kept[sequence]
            assert (alone.removable_from() > 0) == (n > 3)


def selecting(context: BudgetContext, parts: list[Part]) -> int:
    """Decode; how many sequences selected before their step."""
    before = [context.removable_from(part.sequence) for part in parts]
    context.decode(*parts)
    return sum(context.removable_from(part.sequence) != then for part, then in zip(parts, before, strict=True))


def allocated(context: BudgetContext) -> list[tuple[int, int]]:
    return [(buffer.context, buffer.compute) for buffer in measure(context)]  # type: ignore[arg-type]


def test_one_sequence_at_a_time_selects(kv_model: BudgetModel) -> None:
    with kv_model.context(256, BUDGET, n_seq=4, ubatch=64) as context:
        context.set_step(5)
        for sequence in range(4):
            context.read(tokens(200), sequence)
        counts = [selecting(context, [Part(sequence, tokens(5, step)) for sequence in range(4)]) for step in range(120)]
        assert max(counts) == 1
        assert sum(counts) >= 4 * 3


def test_memory_is_reserved(kv_model: BudgetModel) -> None:
    """More than prompts need where each layer has a mask of its own."""
    with kv_model.context(1024, Budget((300, 600, 900)), n_seq=4, ubatch=64) as context:
        before = allocated(context)
        context.set_step(MOST)
        memory = allocated(context)
        assert memory > before
        context.decode(*(Part(sequence, tokens(1000)) for sequence in range(4)))
        for n in (MOST, 3, MOST):
            context.decode(*(Part(sequence, tokens(n)) for sequence in range(4)), every=True)
        assert allocated(context) == memory


def test_who_has_no_queries_does_not_select_early(kv_model: BudgetModel) -> None:
    """Of three that would take turns, one has had all that its ring held removed."""
    with kv_model.context(256, Budget((200, 200, 200), slack=MOST), n_seq=3, ubatch=64) as context:
        context.set_step(MOST)
        for sequence, (count, removed) in enumerate(((50, 0), (55, 25), (30, 0))):
            context.read(tokens(199), sequence)
            for at in range(0, count, 5):
                context.read(tokens(5, at), sequence)
            assert context.remove(sequence, 199 + count - removed)
        context.decode(*(Part(sequence, tokens(MOST)) for sequence in range(3)))
        assert [context.rows(sequence)[0] for sequence in range(3)] == [200 + 16, 229 + 16, 229 + 16]


@pytest.mark.parametrize("n", [1, 6, MOST])
def test_more_sequences_than_room(kv_model: BudgetModel, n: int) -> None:
    """None is refused, and as few select at a time as can be."""
    with kv_model.context(256, TIGHT, n_seq=24, ubatch=512, batch=6144) as context:
        context.set_step(n)
        for sequence in range(24):
            context.read(tokens(250), sequence)
        counts = [selecting(context, [Part(sequence, tokens(n, step)) for sequence in range(24)]) for step in range(20)]
        assert max(counts) <= 24 // (MOST // n) + 1
        assert all(context.last(sequence) == 250 + 20 * n - 1 for sequence in range(24))


def test_faults_and_aborts(kv_model: BudgetModel) -> None:
    """Of two steps of which one selects, in ubatches of four: each sequence is as before, or has selected."""
    calls, limit = 0, 10**9

    def abort() -> bool:
        nonlocal calls
        calls += 1
        return calls > limit

    parts = [Part(0, tokens(5, 1)), Part(1, tokens(MOST, 2))]
    with kv_model.context(256, TIGHT, n_seq=2, ubatch=4, abort=abort) as context, \
         kv_model.context(256, TIGHT, n_seq=2, ubatch=4) as quiet:  # fmt: skip
        for each in (context, quiet):
            each.set_step(MOST)
            each.read(tokens(200), 0)
            each.read(tokens(245, 3), 1)
            each.read(tokens(14, 4), 1)
        saved = [context.saved(sequence) for sequence in range(2)]
        before = [state(quiet, sequence) for sequence in range(2)]
        selected = before[1][0], TIGHT.rows
        seen = set()

        def check() -> None:
            assert state(context, 0) == before[0]
            now = state(context, 1)
            assert now == before[1] or now[:2] == selected
            seen.add(now == before[1])
            for sequence, each in enumerate(saved):
                context.restore(each, sequence)

        assert faults(lambda context: context.decode(*parts), context, check) >= 12
        assert seen == {True, False}
        check_again = [state(context, sequence) for sequence in range(2)]
        for sequence, each in enumerate(saved):
            context.restore(each, sequence)
        calls = 0
        wanted = quiet.decode(*parts)
        context.decode(*parts)
        for at in np.linspace(1, calls - 1, 25):
            for sequence, each in enumerate(saved):
                context.restore(each, sequence)
            calls, limit = 0, int(at)
            with pytest.raises(Aborted):
                context.decode(*parts)
            limit = 10**9
            check()
        assert all(np.array_equal(*pair) for pair in zip(context.decode(*parts), wanted, strict=True))
        after = [state(quiet, sequence) for sequence in range(2)]
        assert [state(context, sequence) for sequence in range(2)] == after == check_again


def test_no_query_is_lost_by_a_step_that_failed(kv_model: BudgetModel) -> None:
    """It overwrites those that a removal of as many tokens would need."""
    with kv_model.context(512, BUDGET, ubatch=64) as context, kv_model.context(512, BUDGET, ubatch=64) as quiet:
        for each in (context, quiet):
            each.set_step(MOST)
            each.read(prompt(0))
            each.read(tokens(12, 1))
        context.fail_at(1)
        with pytest.raises(RuntimeError):
            context.read(tokens(MOST, 2))
        assert context.select() == quiet.select() == 3
        assert state(context, 0) == state(quiet, 0)


def test_copies_and_saved_states_go_on_alike(kv_model: BudgetModel) -> None:
    """After a step whose end was removed, by the copy or before."""
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context, \
         kv_model.context(512, BUDGET, ubatch=64) as other:  # fmt: skip
        for each in (context, other):
            each.set_step(MOST)
        context.read(prompt(0))
        context.read(tokens(MOST, 1))
        context.copy(0, 1, end=305)
        assert context.remove(0, 305)
        context.copy(0, 2)
        other.restore(context.saved(0), 0)
        assert context.removable_from(2) == other.removable_from() == 300
        wanted = context.read(tokens(9, 2), 0, every=True)
        for each, sequence in ((context, 1), (context, 2), (other, 0)):
            assert np.array_equal(each.read(tokens(9, 2), sequence, every=True), wanted)
            assert state(each, sequence) == state(context, 0)
            assert each.remove(sequence, 306)
        assert context.remove(0, 306)
        for each, sequence in ((context, 0), (context, 1), (context, 2), (other, 0)):
            assert each.select(sequence) == 3
            assert state(each, sequence) == state(context, 0)


@pytest.mark.parametrize("prefill", PREFILLS)
def test_what_is_no_step_is_a_prompt(kv_model: BudgetModel, prefill: str) -> None:
    """More tokens, the first ones, and those that are read as one."""
    with kv_model.context(512, replace(BUDGET, rows=(12, 12, 12), prefill=prefill), n_seq=2, ubatch=64) as context:
        context.set_step(13)
        context.read(tokens(13))
        assert context.rows() == (12, 12, 12)
        context.read(tokens(13))
        assert context.rows() == (25, 25, 25)
        context.read(tokens(14))
        assert context.rows() == (12, 12, 12)
        context.read_in_steps(tokens(2))
        assert context.rows() == (12, 12, 12)
        assert context.removable_from() == context.last() + 1
        assert context.removable_from(1) == 0


def test_no_copy_is_needed(kv_model: BudgetModel) -> None:
    """Where a prompt would have none, and while others are being read."""
    with kv_model.context(512, replace(BUDGET, n_copies=0), n_seq=2, ubatch=64) as context:
        context.read(prompt(0))
        with pytest.raises(Refused, match="no room for a copy"):
            context.read([5, 6])
        context.begin(prompt(2), 1)
        assert context.set_step(2) == 0
        wanted = context.read([5, 6])
        while not context.step(1).finished:
            context.read([5, 6])
        with pytest.raises(Refused, match="no room for a copy"):
            context.read([5, 6, 7])
        logits = context._logits([-1])
    with kv_model.context(512, BUDGET, ubatch=64) as alone:
        assert np.array_equal(alone.read(prompt(2)), logits)
        alone.clear()
        alone.read(prompt(0))
        for token in (5, 6):
            last = alone.read([token])
        assert nmse(wanted, last) < 1e-6


def test_steps_that_cannot_be(kv_model: BudgetModel) -> None:
    """The number before holds on."""
    budget = Budget((250, 240, 200), slack=6)
    with kv_model.context(512, budget, ubatch=64) as context:
        assert context.set_step(3) == 0
        for n in (0, 7, 2**32 - 1):
            assert context.set_step(n) == -1
            assert f"a step of {n} tokens; in this context it has 1 to 6" in context.refusal
        context.fail_at(0)
        assert context.set_step(6) == -2
        assert "no memory" in context.refusal
        context.read(tokens(255))
        context.read(tokens(3))
        assert context.rows() == (253, 243, 203)
        context.read(tokens(4))
        assert context.rows() == budget.rows
        assert context.removable_from(1) == context.removable_from(-1) == -1
    with kv_model.context(256) as stock:
        assert stock.set_step(2) == stock.removable_from() == -1


def test_nothing_changes_where_nothing_is_evicted(kv_model: BudgetModel) -> None:
    with kv_model.context(256, Budget((256,) * 3), ubatch=64) as context, kv_model.context(256, ubatch=64) as stock:
        assert context.set_step(MOST) == 0
        assert context.set_step(MOST + 1) == -1
        for n in (200, 16, 3, 37):
            assert np.array_equal(context.read(tokens(n), every=True), stock.read(tokens(n), every=True))
        assert context.removable_from() == 0
        with pytest.raises(Refused, match="exceed its context"):
            context.read([5])
        assert context.remove(0, 100)
        assert context.rows() == (100, 100, 100)
