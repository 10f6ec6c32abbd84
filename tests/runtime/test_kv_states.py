"""Sequences with budgets that are copied, saved and restored: each goes on as the original would have, bit for bit."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetContext, BudgetModel, Floats, Refused
from helpers.kv_models import BUDGET, Models, prompt, state, tokens

WAYS: dict[str, tuple[Budget, dict[str, Any]]] = {
    "f32": (BUDGET, {}),
    "f16 with flash attention": (BUDGET, {"types": ("f16", "f16"), "flash": True}),
    "max pooling": (replace(BUDGET, pool_type="max"), {}),
    "random": (replace(BUDGET, score="random", seed=3), {}),
    "recent": (replace(BUDGET, score="recent"), {}),
    "tova": (replace(BUDGET, score="tova"), {}),
    "h2o": (replace(BUDGET, score="h2o", pool=1), {}),
    "h2o in a lane": (replace(BUDGET, score="h2o", prefill="lane"), {}),
    "keydiff": (replace(BUDGET, score="keydiff"), {}),
    "lane": (replace(BUDGET, prefill="lane"), {}),
    "chunked": (replace(BUDGET, prefill="chunked"), {}),
    "nothing is evicted": (Budget((600,) * 3), {}),
}


def go_on(context: BudgetContext, sequence: int, seed: int) -> list[Floats]:
    """A selection by queries from before, steps, a removed end, another selection, short and long follow-ups."""
    logits = [context.read([token], sequence) for token in tokens(2, seed + 4)]
    assert context.select(sequence) >= 0
    logits += [context.read([token], sequence) for token in tokens(12, seed)]
    assert context.remove(sequence, context.last(sequence) - 2)
    logits.append(context.read(tokens(3, seed + 1), sequence))
    assert context.select(sequence) >= 0
    logits += [context.read([token], sequence) for token in tokens(3, seed + 2)]
    logits.append(context.read(tokens(90, seed + 3), sequence))
    return logits


def equal(a: list[Floats], b: list[Floats]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [300, 20])
def test_two_branches_go_on_as_the_original_would(kv_model: BudgetModel, way: str, length: int) -> None:
    budget, options = WAYS[way]
    wanted, kept = [], []
    for seed in (1, 2):
        with kv_model.context(512, budget, n_seq=3, ubatch=64, **options) as context:
            context.read(tokens(length))
            context.read([7])
            wanted.append(go_on(context, 0, seed))
            kept.append(state(context, 0))
    with kv_model.context(512, budget, n_seq=3, ubatch=64, **options) as context:
        context.read(prompt(4), 2)  # is forgotten
        context.read(tokens(length))
        context.read([7])
        context.copy(0, 2)
        assert state(context, 2) == state(context, 0)
        assert equal(go_on(context, 2, 2), wanted[1])
        assert equal(go_on(context, 0, 1), wanted[0])
        assert [state(context, sequence) for sequence in (0, 2)] == kept
        assert context.last(1) == -1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "length", [317, 20]
)  # where the ring of queries begins anew between them, and where it does not
def test_a_restored_sequence_goes_on_as_the_original_would(kv_model: BudgetModel, way: str, length: int) -> None:
    budget, options = WAYS[way]
    with kv_model.context(512, budget, n_seq=2, ubatch=64, **options) as context:
        context.read(tokens(length))
        context.read([7])
        saved, before = context.saved(0), state(context, 0)
        wanted, after = go_on(context, 0, 1), state(context, 0)
    with kv_model.context(512, budget, n_seq=2, ubatch=64, **options) as context:
        context.read(prompt(4), 1)  # is forgotten
        context.restore(saved, 1)
        assert context.refusal == ""
        assert state(context, 1) == before
        assert context.saved(1)[8:] == saved[8:]  # upstream puts the sequence's number before
        assert equal(go_on(context, 1, 1), wanted)
        assert state(context, 1) == after


@pytest.mark.parametrize("shape", ["uneven", "wide"])
def test_rows_of_every_shape_and_of_quantized_types(kv_files: Models, shape: str) -> None:
    types = ("q8_0", "q8_0") if shape == "wide" else ("f16", "f16")
    with BudgetModel(kv_files[shape]) as model:
        options: dict[str, Any] = {"types": types, "flash": shape == "wide", "ubatch": 64, "n_seq": 2}
        budget = replace(BUDGET, rows=BUDGET.rows[:2] if shape == "wide" else BUDGET.rows)
        with model.context(512, budget, **options) as context:
            context.read(prompt(0))
            context.copy(0, 1)
            saved = context.saved(1)
            wanted = go_on(context, 0, 1)
            assert equal(go_on(context, 1, 1), wanted)
        with model.context(512, budget, **options) as context:
            context.restore(saved, 0)
            assert equal(go_on(context, 0, 1), wanted)


def test_a_copy_may_leave_out_an_end_that_could_be_removed(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
        context.read(prompt(0))
        for token in tokens(9, 1):
            context.read([token])
        before = state(context, 0)
        context.copy(0, 1, -1, 304)
        context.copy(0, 2, 0, 10_000)
        assert (state(context, 0), state(context, 2)) == (before, before)
        assert context.remove(0, 304)
        assert state(context, 0) == state(context, 1)
        assert equal(go_on(context, 0, 1), go_on(context, 1, 1))


def test_an_empty_sequence_and_a_copy_onto_itself(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, n_seq=2, ubatch=64) as context:
        context.read(prompt(0))
        before, empty = state(context, 0), state(context, 1)
        saved = context.saved(1)
        context.copy(0, 0)
        assert state(context, 0) == before
        context.copy(1, 0)
        assert state(context, 0) == empty
        context.read(prompt(0))
        context.restore(saved, 0)
        assert state(context, 0) == empty
        context.read(prompt(0))
        assert state(context, 0) == before


def test_a_copy_has_the_budget_of_the_original(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
        assert context.set_budget(0, (20, 30, 10)) == 0
        context.read(prompt(0))
        context.copy(0, 1)
        context.restore(context.saved(0), 2)
        for sequence in range(3):
            context.read(tokens(100, 1), sequence)
            assert context.rows(sequence) == (20, 30, 10)


COPIES: dict[str, tuple[tuple[int, ...], str]] = {
    "from the middle": ((0, 1, 10), "from its beginning"),
    "before the selection": ((0, 1, -1, 250), "before its last selection"),
    "of no sequence": ((3, 1), "is not one of"),
    "to no sequence": ((0, 3), "is not one of"),
    "to a negative one": ((0, -1), "is not one of"),
}


@pytest.mark.parametrize("name", COPIES)
def test_refused_copies_change_nothing(kv_model: BudgetModel, name: str) -> None:
    arguments, reason = COPIES[name]
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
        for sequence in (0, 1):
            context.read(prompt(sequence), sequence)
        before = [context.saved(sequence) for sequence in range(3)]
        with pytest.raises(Refused, match=reason):
            context.copy(*arguments)
        assert [context.saved(sequence) for sequence in range(3)] == before
        context.copy(0, 2)
        assert context.refusal == ""


def test_everything_is_saved_at_once(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
        for sequence in (0, 2):
            context.read(prompt(sequence), sequence)
        before, saved = [state(context, sequence) for sequence in range(3)], context.saved()
        wanted = [context.read([5], sequence) for sequence in (0, 2)]
        context.clear()
        context.read(prompt(1), 1)
        context.restore(saved)
        assert [state(context, sequence) for sequence in range(3)] == before
        assert equal([context.read([5], sequence) for sequence in (0, 2)], wanted)
    with kv_model.context(512, BUDGET, n_seq=2, ubatch=64) as context:
        with pytest.raises(Refused, match="of 3 sequences, not 2"):
            context.restore(saved)


def test_what_a_sequence_does_not_use_is_not_saved(kv_model: BudgetModel) -> None:
    """Neither rows and queries of those that were there before, nor places that are empty."""
    with kv_model.context(512, BUDGET, n_seq=1, ubatch=64) as context:
        empty = len(context.saved(0))
        context.read(tokens(5))
        few = context.saved(0)
        assert len(few) < empty + 5 * 3 * (2 * 2 + 4) * 16 * 4 + 1
        context.remove(0)
        context.read(prompt(0))
        context.remove(0)
        context.read(tokens(5))
        assert context.saved(0) == few


OTHERS: dict[str, tuple[Budget, dict[str, Any], str]] = {
    "rows": (Budget((40, 60, 24)), {}, "another budget of layer 1: 64, this context has 60"),
    "window": (replace(BUDGET, window=7), {}, "window"),
    "sinks": (replace(BUDGET, sinks=1), {}, "sinks"),
    "pooling width": (replace(BUDGET, pool=7), {}, "pooling width"),
    "kind of pooling": (replace(BUDGET, pool_type="max"), {}, "kind of pooling"),
    "score": (replace(BUDGET, score="recent"), {}, "score"),
    "slack": (replace(BUDGET, slack=9), {}, "slack"),
    "seed": (replace(BUDGET, seed=1), {}, "seed"),
    "type of K": (BUDGET, {"types": ("f16", "f32")}, "type of K"),
    "type of V": (BUDGET, {"types": ("f32", "f16")}, "type of V"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_context_is_refused_with_what_differs(kv_model: BudgetModel, name: str) -> None:
    budget, options, reason = OTHERS[name]
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(prompt(0))
        saved = context.saved(0)
    with kv_model.context(512, budget, ubatch=64, **options) as context:
        context.read(prompt(1))
        before = context.saved(0)
        with pytest.raises(Refused, match=reason):
            context.restore(saved, 0)
        assert context.saved(0) == before


def test_a_state_of_another_model_is_refused(kv_model: BudgetModel, kv_files: Models) -> None:
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(prompt(0))
        saved = context.saved(0)
    for shape, reason in (("mha", "width of K of layer 0"), ("head_32", "number of layers")):
        with BudgetModel(kv_files[shape]) as model:
            budget = replace(BUDGET, rows=BUDGET.rows[:2]) if shape == "head_32" else BUDGET
            with model.context(512, budget, ubatch=64) as context, pytest.raises(Refused, match=reason):
                context.restore(saved, 0)


def test_states_of_sequences_that_are_none(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, n_seq=2, ubatch=64) as context:
        saved = context.saved(0)
        for sequence in (2, 99, -2):
            with pytest.raises(Refused):
                context.saved(sequence)
            with pytest.raises(Refused, match="is not one of 2"):
                context.restore(saved, sequence)


# --- damaged states: refused, or of a sequence that can be; never a crash

NUMBERS = 8 + 4 * (2 + 10 + 3 * 8 + 1)
"""Where the numbers of the sequence begin: after upstream's two and what identifies the context."""


def survives(context: BudgetContext, damaged: bytes, whole: bytes, tidy: Callable[[], None]) -> bool:
    """Whether a damaged state was taken. Either way nothing breaks, and if not, nothing has changed."""
    before = context.saved(0)
    try:
        context.restore(damaged, 0)
    except Refused:
        assert context.saved(0) == before
        return False
    try:
        context.read([5])
        context.select()
        context.kept()
    except Refused:
        pass  # positions at the end of what a number can hold
    tidy()
    context.restore(whole, 0)
    return True


@pytest.fixture
def whole(kv_model: BudgetModel) -> bytes:
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(prompt(0))
        for token in tokens(5, 1):
            context.read([token])
        return context.saved(0)


def test_every_flipped_byte(kv_model: BudgetModel, whole: bytes) -> None:
    n_numbers = 4 * (2 + 3 * 3)
    numbers = struct.unpack_from("<11I", whole, NUMBERS)
    assert (numbers[0], numbers[2:]) == (305, (45, 40, 40, 69, 64, 64, 29, 24, 24))
    taken = set()
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(prompt(1))
        for at in (*range(NUMBERS + n_numbers), *range(NUMBERS + n_numbers, len(whole), 211)):
            damaged = bytearray(whole)
            damaged[at] ^= 0xFF
            if survives(context, bytes(damaged), whole, lambda: None):
                taken.add(at)
        assert not taken & (set(range(4)) | set(range(8, NUMBERS)))  # the rest is the payload's: kv_file has a checksum
        context.restore(whole, 0)
        context.read([5])


def test_every_truncation(kv_model: BudgetModel, whole: bytes) -> None:
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(prompt(1))
        before = context.saved(0)
        for length in (*range(NUMBERS + 60), *range(NUMBERS + 60, len(whole), 499), len(whole) - 1):
            with pytest.raises(Refused):
                context.restore(whole[:length], 0)
        assert context.saved(0) == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({0: 2**31}, "positions"),
        ({1: 306}, "positions"),  # queries of tokens to come
        ({1: 280}, "positions"),  # more of them than the ring has
        ({0: 44, 1: 44}, "number of rows in layer 0"),  # 45 rows of 44 tokens
        ({2: 257}, "number of rows in layer 0"),  # more than are allocated
        ({2: 39}, "number of rows in layer 0"),  # fewer than the selection left
        ({2: 2**32 - 1}, "number of rows in layer 0"),
        ({3: 41}, "number of rows in layer 0"),  # the selection left more than the budget
        ({3: 9}, "number of rows in layer 0"),  # and less than window and sinks
        ({3: 0}, "number of rows in layer 0"),  # nothing was selected, so that 305 rows would be there
        ({4: 9}, "budget in layer 0"),
        ({4: 41}, "budget in layer 0"),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused(
    kv_model: BudgetModel, whole: bytes, changes: dict[int, int], reason: str
) -> None:
    damaged = bytearray(whole)
    for index, value in changes.items():
        struct.pack_into("<I", damaged, NUMBERS + 4 * index, value)
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.read(prompt(1))
        before = context.saved(0)
        with pytest.raises(Refused, match=reason):
            context.restore(bytes(damaged), 0)
        assert context.saved(0) == before


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, 300.0, 1e30, float("nan"), float("inf"), -float("inf")])
def test_impossible_positions_are_refused(kv_model: BudgetModel, whole: bytes, value: float) -> None:
    """300 is the first position after the selection; each of these stands in the place of the second."""
    ascending = struct.pack("<2f", 0.0, 1.0)
    at = whole.index(ascending, NUMBERS) + 4
    damaged = bytearray(whole)
    struct.pack_into("<f", damaged, at, value)
    with kv_model.context(512, BUDGET, ubatch=64) as context, pytest.raises(Refused, match="position in layer 0"):
        context.restore(bytes(damaged), 0)


def test_rows_that_are_no_numbers_break_nothing(kv_model: BudgetModel, whole: bytes) -> None:
    first_row = NUMBERS + 4 * 11
    damaged = bytearray(whole)
    damaged[first_row : first_row + 45 * 2 * 16 * 4] = struct.pack("<f", float("nan")) * (45 * 2 * 16)
    with kv_model.context(512, BUDGET, ubatch=64) as context:
        context.restore(bytes(damaged), 0)
        context.read([5])
        assert context.select() == 3
        assert context.rows() == BUDGET.rows
        for kept in context.kept():
            assert (np.diff(kept, axis=1) > 0).all()
        context.restore(whole, 0)
        assert not np.isnan(context.read([5])).any()


def test_while_a_prompt_is_read_its_sequence_is_neither_copied_nor_saved(kv_model: BudgetModel) -> None:
    with kv_model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
        for sequence in (0, 1):
            context.read(prompt(sequence), sequence)
        before = [context.saved(sequence) for sequence in (0, 1)]
        context.begin(tokens(100), 0)
        context.step(0, 2)
        operations: list[Callable[[], object]] = [
            lambda: context.copy(0, 1),
            lambda: context.copy(1, 0),
            lambda: context.restore(before[0], 0),
        ]
        for operation in operations:
            with pytest.raises(Refused, match="a prompt is being read for"):
                operation()
        for sequence in (0, None):
            with pytest.raises(Refused):
                context.saved(sequence)
        assert context.saved(1) == before[1]
        context.copy(1, 2)
        assert context.cancel(0)
        assert context.saved(0) == before[0]
        assert context.saved(2)[8:] == before[1][8:]
