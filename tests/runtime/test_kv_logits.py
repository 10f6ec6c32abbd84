"""What a budget does to logits: nothing before rows are evicted, then what masking those rows does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetContext, BudgetModel, Floats, Part
from helpers.kv_models import Models, first_difference, tokens
from helpers.kv_reference import ReferenceSequence, Weights
from helpers.stock import nmse
from helpers.tiny_models import Shape, write_model

ROWS = (40, 64, 24)
# Flash attention sums values of F16 rows in F16 and rounds what it multiplies, so another order of rows shows.
EXACT, FLASH = 1e-6, 1e-5
KINDS: list[dict[str, Any]] = [
    {"types": ("f32", "f32"), "flash": False},
    {"types": ("f16", "f16"), "flash": False},
    {"types": ("f16", "f16"), "flash": True},
    {"types": ("q8_0", "f16"), "flash": False},
    {"types": ("q8_0", "q8_0"), "flash": True},
    {"types": ("bf16", "bf16"), "flash": False},
    {"types": ("bf16", "q4_0"), "flash": True},
    {"types": ("q4_0", "bf16"), "flash": True},
    {"types": ("q4_0", "q8_0"), "flash": True},
]


@pytest.fixture(scope="module")
def wide(kv_files: Models) -> Iterator[BudgetModel]:
    with BudgetModel(kv_files["wide"]) as model:
        yield model


def conversation(context: BudgetContext, sequences: int) -> Iterator[Floats]:
    """Prompts of several lengths, steps of all sequences together, and second turns."""
    for sequence in range(sequences):
        yield context.read(tokens(70 + 50 * sequence, sequence), sequence, every=True)
    for step in range(6):
        yield from context.decode(*(Part(sequence, tokens(1, step)) for sequence in range(sequences)))
    for sequence in range(sequences):
        yield context.read(tokens(40, 50 + sequence), sequence, every=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("rows", [(512, 512), (10**6, 512), (300, 320)], ids=str)
def test_bit_equal_to_no_budget_when_nothing_is_evicted(
    wide: BudgetModel, rows: tuple[int, ...], sequences: int, kind: dict[str, Any]
) -> None:
    """Rows of the whole context, of more, and of less that suffices."""
    options = {**kind, "n_seq": sequences, "ubatch": 64}
    with wide.context(512, **options) as stock, wide.context(512, Budget(rows), **options) as context:
        for index, (wanted, got) in enumerate(
            zip(conversation(stock, sequences), conversation(context, sequences), strict=True)
        ):
            assert not first_difference(got, wanted), f"part {index}: {first_difference(got, wanted)}"
        assert context.active
        assert context.rows(0) == (116, 116)


def test_mixed_batches_when_nothing_is_evicted(wide: BudgetModel) -> None:
    """A prompt and a step of another sequence in one batch: other kernels may be chosen, no more than that."""
    options: dict[str, Any] = {"n_seq": 2, "ubatch": 64}
    with wide.context(512, **options) as stock, wide.context(512, Budget((512, 512)), **options) as context:
        for each in (stock, context):
            each.read(tokens(90), 0)
        parts = Part(0, tokens(1)), Part(1, tokens(100, 1)), Part(0, tokens(3, 2))
        for wanted, got in zip(stock.decode(*parts), context.decode(*parts), strict=True):
            assert nmse(got, wanted) < 1e-10


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("ubatch", [32, None])
def test_prompt_logits_do_not_feel_the_eviction(wide: BudgetModel, ubatch: int | None, kind: dict[str, Any]) -> None:
    with wide.context(512, **kind, ubatch=ubatch) as stock:
        wanted = stock.read(tokens(400), every=True)
    with wide.context(512, Budget((40, 24)), **kind, ubatch=ubatch) as context:
        got = context.read(tokens(400), every=True)
        assert context.rows() == (40, 24)
    assert nmse(got, wanted) < 1e-6


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("shape", ["gqa", "mha", "mqa", "uneven"])
def test_logits_after_eviction_are_those_of_masked_rows(kv_files: Models, shape: str, flash: bool) -> None:
    """Single steps and a second prompt over the kept rows of every head."""
    budget = Budget(ROWS)
    limit = FLASH if flash else EXACT
    reference = ReferenceSequence(Weights(kv_files[shape]), budget)
    full = ReferenceSequence(reference.w)
    with BudgetModel(kv_files[shape]) as model, model.context(512, budget, ubatch=64, flash=flash) as context:
        assert nmse(context.read(tokens(300), every=True), reference.read(tokens(300)).astype(np.float32)) < limit
        full.read(tokens(300))
        reference.select(context.kept())
        for token in tokens(12, 1):
            wanted, unmasked = reference.read([token]), full.read([token])
            assert nmse(context.read([token]), wanted.astype(np.float32)) < limit
            assert nmse(unmasked.astype(np.float32), wanted.astype(np.float32)) > 1e-4  # or this test says nothing
        wanted = reference.read(tokens(50, 2))
        assert nmse(context.read(tokens(50, 2), every=True), wanted.astype(np.float32)) < limit
        reference.select(context.kept())
        assert nmse(context.read([9]), reference.read([9]).astype(np.float32)) < limit


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", ["head_32", "wide"])
@pytest.mark.parametrize("ubatch", [32, None])
def test_rows_are_moved_as_they_are(kv_files: Models, shape: str, ubatch: int | None, kind: dict[str, Any]) -> None:
    """The latest rows and the sinks, against the library without budget that forgets all others."""
    budget = Budget((40, 40), sinks=4, score="recent")
    with BudgetModel(kv_files[shape]) as model:
        options = {**kind, "ubatch": ubatch}
        with model.context(512, budget, **options) as context, model.context(512, **options) as stock:
            context.read(tokens(300))
            stock.read(tokens(300))
            assert stock.remove(0, 4, 300 - 36)
            for token in tokens(8, 1):
                assert nmse(context.read([token]), stock.read([token])) < (FLASH if kind["flash"] else 1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scored_rows_are_moved_as_they_are(tmp_path_factory: pytest.TempPathFactory, kind: dict[str, Any]) -> None:
    """One layer and one KV head, so that the library without budget can forget the very same rows."""
    path = write_model(
        tmp_path_factory.mktemp("one") / "one.gguf", Shape(n_layer=1, n_head=2, n_head_kv=1, head_dim=64)
    )
    with BudgetModel(path) as model:
        options = {**kind, "ubatch": 50}
        with model.context(512, Budget((40,)), **options) as context, model.context(512, **options) as stock:
            context.read(tokens(300))
            stock.read(tokens(300))
            for position in set(range(300)) - set(context.positions(0)[0].tolist()):
                assert stock.remove(0, position, position + 1)
            for token in tokens(8, 1):
                assert nmse(context.read([token]), stock.read([token])) < (FLASH if kind["flash"] else 1e-9)


def test_off_is_off(kv_model: BudgetModel) -> None:
    with kv_model.context(512) as context:
        assert not context.active
        assert context.layout() is None
        assert context.capacity() == context.rows() == ()
        assert context.refusal == ""
        assert context.select() == -1
        assert context.set_budget(0, ROWS) == -1
        context.read(tokens(20))
        assert context.can_shift
        assert context.saved(0)
        context.shift(0, 10, 20, 5)
        assert context.last() == 24
