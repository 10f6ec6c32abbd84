"""Which rows a layer keeps: those of an independent reference, whatever the batches and kernels were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetContext, BudgetModel, Ints
from helpers.kv_models import SHAPES, Models, tokens
from helpers.kv_reference import ReferenceSequence, Weights

LENGTH = 700
ROWS = (40, 64, 24)
# Relative difference of two scores that rounding may swap: F32 throughout, and flash attention's sums
TIE, FLASH_TIE = 1e-4, 1e-3


@pytest.fixture(scope="module")
def weights(kv_files: Models) -> Weights:
    return Weights(kv_files["gqa"])


#: Scores that are not the latest rows or chance.
COMPUTED = ("snapkv", "tova", "keydiff", "h2o")


def scored(score: str, budget: Budget) -> Budget:
    """The budget by another score, which like the published ones is not pooled."""
    return replace(budget, score=score, pool=budget.pool if score == "snapkv" else 1)


def follow(reference: ReferenceSequence, context: BudgetContext, tie: float = TIE, sequence: int = 0) -> None:
    """Check what the context kept against the reference, which then keeps the same."""
    kept = context.kept(sequence)
    for layer, positions in enumerate(kept):
        reference.swaps(layer, positions, tie)
    reference.select(kept)


def kept_of(model: BudgetModel, prompt: list[int], budget: Budget, n_ctx: int = 1024, **options: object) -> list[Ints]:
    with model.context(n_ctx, budget, **options) as context:
        context.read(prompt)
        assert context.rows() == tuple(min(len(prompt), rows) for rows in budget.rows)
        return context.kept()


def same(a: list[Ints], b: list[Ints]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("score", COMPUTED)
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(
    ("shape", "ubatch"),
    [("gqa", 1), ("gqa", 32), ("gqa", 512), ("gqa", None), ("mha", 32), ("mqa", 32), ("uneven", 32), ("head_32", 96)],
)
def test_kept_rows_are_the_references(
    kv_files: Models, shape: str, ubatch: int | None, flash: bool, score: str
) -> None:
    budget = scored(score, Budget(ROWS[: SHAPES[shape].n_layer]))
    reference = ReferenceSequence(Weights(kv_files[shape]), budget)
    reference.read(tokens(LENGTH))
    with BudgetModel(kv_files[shape]) as model, model.context(1024, budget, ubatch=ubatch, flash=flash) as context:
        context.read(tokens(LENGTH))
        for layer in range(len(budget.rows)):
            swaps = reference.swaps(layer, context.positions(layer), FLASH_TIE if flash else TIE)
            assert swaps <= 2  # near ties are rare, or the scores are flat


@pytest.mark.parametrize(
    "options",
    [
        {"types": ("f16", "f16"), "flash": True},
        {"types": ("f16", "f16"), "flash": False},
        {"types": ("q8_0", "q8_0"), "flash": True},
        {"types": ("q8_0", "f16"), "flash": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", ["head_32", "wide"])
@pytest.mark.parametrize("score", COMPUTED)
def test_batch_size_does_not_matter(kv_files: Models, shape: str, options: dict[str, object], score: str) -> None:
    """Also for rows of fewer bits, where another order of sums moves scores further."""
    budget = scored(score, Budget((40, 24)))
    with BudgetModel(kv_files[shape]) as model:
        sets = [kept_of(model, tokens(300), budget, 512, ubatch=ubatch, **options) for ubatch in (None, 256, 32, 1)]
    for other in sets[1:]:
        for a, b in zip(sets[0], other, strict=True):
            different = sum(len(np.setdiff1d(x, y)) for x, y in zip(a, b, strict=True))
            assert different <= 1, (a, b)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(ROWS, pool=1),
        Budget(ROWS, pool=7, pool_type="max"),
        Budget(ROWS, pool=5, pool_type="max", window=3),
        Budget(ROWS, pool=9, sinks=0),
        Budget(ROWS, window=1),
        Budget((50, 70, 40), window=32, sinks=4),
        Budget((10, 11, 700)),  # window and sinks alone; the last layer keeps all
        Budget((699, 12, 1024)),
        Budget((256, 257, 255), slack=1),
        Budget(ROWS, pool=1, score="tova"),
        Budget(ROWS, pool=5, score="tova", window=1, sinks=0),
        Budget(ROWS, pool=1, score="keydiff"),
        Budget(ROWS, pool=1, score="h2o", window=3),
        Budget(ROWS, pool=5, score="h2o", window=20, sinks=0),
        Budget(ROWS, pool=7, score="keydiff", pool_type="max", window=1),
    ],
    ids=lambda b: f"{b.score}-{b.rows}-w{b.window}-s{b.sinks}-{b.pool}{b.pool_type}",
)
@pytest.mark.parametrize("ubatch", [48, None])
def test_every_setting(kv_model: BudgetModel, weights: Weights, budget: Budget, ubatch: int | None) -> None:
    reference = ReferenceSequence(weights, budget)
    reference.read(tokens(LENGTH, 1))
    with kv_model.context(1024, budget, ubatch=ubatch) as context:
        context.read(tokens(LENGTH, 1))
        follow(reference, context)


@pytest.mark.parametrize("score", COMPUTED)
@pytest.mark.parametrize("length", [2, 8, 9, 24, 25, 33, 41, 65, 257])
def test_short_prompts_and_last_chunks(kv_model: BudgetModel, weights: Weights, length: int, score: str) -> None:
    """Prompts below the window, at a budget, one above it; last chunks of one token and of less than the window."""
    budget = scored(score, Budget(ROWS))
    for ubatch in (5, 32, None):
        reference = ReferenceSequence(weights, budget)
        reference.read(tokens(length, 2))
        with kv_model.context(512, budget, ubatch=ubatch) as context:
            context.read(tokens(length, 2))
            assert context.rows() == tuple(min(length, rows) for rows in ROWS)
            follow(reference, context)


@pytest.mark.parametrize("score", COMPUTED)
@pytest.mark.parametrize("ubatch", [32, None])
def test_turns_continue_on_the_kept_rows(
    kv_model: BudgetModel, weights: Weights, ubatch: int | None, score: str
) -> None:
    """A second prompt, one shorter than the window, one of a single token too many, and a long one."""
    budget = scored(score, Budget(ROWS))
    reference = ReferenceSequence(weights, budget)
    with kv_model.context(1024, budget, ubatch=ubatch) as context:
        for turn, length in enumerate((300, 120, 3, 25, 500)):
            reference.read(tokens(length, turn))
            context.read(tokens(length, turn))
            follow(reference, context)
        assert context.last() == 300 + 120 + 3 + 25 + 500 - 1


@pytest.mark.parametrize("score", COMPUTED)
def test_generation_selects_when_a_layer_is_full(kv_model: BudgetModel, weights: Weights, score: str) -> None:
    """By the queries of the last tokens, which were generated; endlessly, far beyond the context."""
    budget = scored(score, Budget(ROWS, slack=1))
    reference = ReferenceSequence(weights, budget)
    reference.read(tokens(200))
    selections = 0
    with kv_model.context(256, budget, ubatch=64) as context:
        capacity = context.capacity()
        context.read(tokens(200))
        follow(reference, context)
        for token in tokens(600, 3):
            full = any(used == most for used, most in zip(reference.rows(), capacity, strict=True))
            context.read([token])
            if full:
                selections += 1
                kept = [positions[:, :-1] for positions in context.kept()]  # the last one came after
                for layer, positions in enumerate(kept):
                    reference.swaps(layer, positions, TIE)
                reference.select(kept)
            reference.read([token])
            assert context.rows() == reference.rows()
        follow_last = context.kept()
    assert selections >= 2
    for layer, positions in zip(reference.layers, follow_last, strict=True):
        assert np.array_equal(layer.positions, positions)
    assert reference.n == 800


@pytest.mark.parametrize("score", COMPUTED)
def test_selecting_on_request(kv_model: BudgetModel, weights: Weights, score: str) -> None:
    budget = scored(score, Budget(ROWS))
    reference = ReferenceSequence(weights, budget)
    with kv_model.context(512, budget, ubatch=64) as context:
        context.read(tokens(30))
        assert context.rows() == (30, 30, 24)
        reference.read(tokens(30))
        follow(reference, context)
        for token in tokens(50, 1):
            context.read([token])
            reference.read([token])
        assert context.rows() == (80, 80, 74)
        assert context.select() == 3
        follow(reference, context)
        assert context.rows() == ROWS
        assert context.select() == 0


@pytest.mark.parametrize("score", COMPUTED)
def test_a_sequence_with_a_budget_of_its_own(kv_model: BudgetModel, weights: Weights, score: str) -> None:
    budget, own = (scored(score, Budget(rows)) for rows in (ROWS, (20, 64, 12)))
    reference, other = ReferenceSequence(weights, own), ReferenceSequence(weights, budget)
    with kv_model.context(512, budget, n_seq=2, ubatch=64) as context:
        assert context.set_budget(0, own.rows) == 0
        for sequence, expected in ((0, reference), (1, other)):
            context.read(tokens(300), sequence)
            expected.read(tokens(300))
            follow(expected, context, sequence=sequence)
        assert context.set_budget(0, None) == 0
        context.read(tokens(300), 0)
        assert context.rows(0) == ROWS
        # more than is allocated, less than always stays, a wrong number of layers, no such sequence
        for sequence, rows in ((0, (400, 64, 24)), (0, (5, 64, 24)), (0, (40, 64)), (7, ROWS)):
            assert context.set_budget(sequence, rows) != 0


def test_recent_rows(kv_model: BudgetModel) -> None:
    budget = Budget(ROWS, score="recent", sinks=4)
    for ubatch in (32, None):
        for kept, rows in zip(kept_of(kv_model, tokens(LENGTH), budget, ubatch=ubatch), ROWS, strict=True):
            assert (kept == np.r_[:4, LENGTH - rows + 4 : LENGTH]).all()


def test_random_rows(kv_model: BudgetModel) -> None:
    budget = Budget(ROWS, score="random", seed=1)
    sets = kept_of(kv_model, tokens(LENGTH), budget, ubatch=32)
    for kept, rows in zip(sets, ROWS, strict=True):
        assert kept.shape == (2, rows)
        assert (np.diff(kept, axis=1) > 0).all()
        assert (kept[:, :2] == [0, 1]).all()
        assert (kept[:, -8:] == np.arange(LENGTH - 8, LENGTH)).all()
        between = kept[:, 2:-8].ravel()
        assert abs(between.mean() - LENGTH / 2) < 150  # 5 deviations for 28 of them
    assert same(sets, kept_of(kv_model, tokens(LENGTH), budget, ubatch=None))
    assert not same(sets, kept_of(kv_model, tokens(LENGTH), Budget(ROWS, score="random", seed=2)))


@pytest.mark.parametrize("score", COMPUTED)
def test_chunked_selects_after_every_ubatch(kv_model: BudgetModel, weights: Weights, score: str) -> None:
    budget = scored(score, Budget(ROWS, prefill="chunked"))
    reference = ReferenceSequence(weights, budget)
    exact = ReferenceSequence(weights, budget)
    prompt = tokens(512)
    exact.read(prompt)
    with kv_model.context(1024, budget, ubatch=128) as context:
        context.read(prompt)
        for start in range(0, 512, 128):
            reference.read(prompt[start : start + 128])
            reference.select()
        kept = context.kept()
    for layer, positions in zip(reference.layers, kept, strict=True):
        assert np.array_equal(layer.positions, positions)
    assert any(not np.array_equal(exact.wanted(layer), kept[layer]) for layer in range(3))


def test_two_prompts_one_after_the_other(kv_model: BudgetModel) -> None:
    """Nothing of the first stays behind."""
    budget = Budget(ROWS)
    with kv_model.context(1024, budget, ubatch=64) as context:
        context.read(tokens(LENGTH, 5))
        assert context.remove(0)
        assert context.rows() == (0, 0, 0)
        logits = context.read(tokens(333, 6))
        kept = context.kept()
    with kv_model.context(1024, budget, ubatch=64) as context:
        assert np.array_equal(context.read(tokens(333, 6)), logits)
        assert same(context.kept(), kept)
