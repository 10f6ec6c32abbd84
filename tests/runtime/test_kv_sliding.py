"""Models some of whose layers have a sliding window: those stay what they are without a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetContext, BudgetModel, Floats, Part, Refused
from helpers.kv_models import Models, first_difference, tokens
from helpers.stock import nmse
from helpers.tiny_models import Shape, write_model
from ziggurat.runtime import plan
from ziggurat.runtime.bindings import Model, kv
from ziggurat.runtime.gguf_file import read_gguf

WINDOW = 30  # of "sliding_short" and "sliding_wide"; their rings have 256 rows
KINDS: list[dict[str, Any]] = [
    {"types": ("f32", "f32"), "flash": False},
    {"types": ("f16", "f16"), "flash": True},
    {"types": ("q8_0", "q8_0"), "flash": True},
]


def far(context: BudgetContext, sequences: int) -> list[Floats]:
    """Prompts and steps of all sequences, further than a ring holds, and a second turn."""
    found = [context.read(tokens(330 + 50 * s, s), s, every=True) for s in range(sequences)]
    for step in range(6):
        found += context.decode(*(Part(sequence, tokens(1, step)) for sequence in range(sequences)))
    return found + [context.read(tokens(180, 50 + s), s, every=True) for s in range(sequences)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sequences", [1, 3])
def test_bit_equal_to_no_budget_when_nothing_is_evicted(kv_files: Models, sequences: int, kind: dict[str, Any]) -> None:
    options = {**kind, "n_seq": sequences, "ubatch": 64}
    with BudgetModel(kv_files["sliding_wide"]) as model:
        with model.context(768, **options) as stock, model.context(768, Budget((999, 999)), **options) as context:
            for index, (wanted, got) in enumerate(zip(far(stock, sequences), far(context, sequences), strict=True)):
                assert not first_difference(got, wanted), f"part {index}: {first_difference(got, wanted)}"
            assert context.active
            assert context.capacity() == (256, 768)
            assert context.rows() == (256, 330 + 6 + 180)


@pytest.mark.parametrize("prefill", ["exact", "lane"])
def test_prompt_logits_are_those_of_no_budget(kv_files: Models, prefill: str) -> None:
    """Read layer by layer or in the lane, in the same ubatches: to the last bit. A second turn goes on from there."""
    with BudgetModel(kv_files["sliding_short"]) as model:
        budget = Budget((40, 0, 24), prefill=prefill)
        with model.context(1024, ubatch=64) as stock, model.context(1024, budget, ubatch=64) as context:
            assert np.array_equal(stock.read(tokens(700), every=True), context.read(tokens(700), every=True))
            assert context.rows() == (40, 256, 24)
            assert (context.positions(1) == np.arange(700 - 256, 700)).all()
            layout = context.layout()
            assert layout is not None
            assert layout.layer_major == (prefill == "exact")


@pytest.mark.parametrize("prefill", ["exact", "lane", "chunked"])
def test_a_prompt_that_is_given_up_leaves_the_ring(kv_files: Models, prefill: str) -> None:
    """One that would go round it several times, cancelled after every number of steps."""
    budget = Budget((40, 0, 24), prefill=prefill)
    with BudgetModel(kv_files["sliding_short"]) as model, model.context(1024, budget, ubatch=64) as context:
        context.read(tokens(500))
        before, kept = context.saved(0), context.kept()
        for steps in (1, 5, 10):
            context.begin(tokens(700, 1))
            context.step(steps=steps)
            assert context.cancel()
            assert context.saved(0) == before
        wanted = context.read([7])
        context.restore(before, 0)
        assert all(np.array_equal(a, b) for a, b in zip(context.kept(), kept, strict=True))
        assert np.array_equal(context.read([7]), wanted)


@pytest.mark.parametrize("rows", [(40, 0, 24), (999, 0, 999)], ids=["evicts", "keeps all"])
def test_as_much_is_removed_as_leaves_a_window(kv_files: Models, rows: tuple[int, ...]) -> None:
    """Other tokens in their place then give what they give where the first ones never were."""
    with BudgetModel(kv_files["sliding_short"]) as model:
        budget = Budget(rows, slack=250)
        with model.context(768, budget, ubatch=64) as context, model.context(768, budget, ubatch=64) as fresh:
            for each in (context, fresh):
                each.read(tokens(100))
                for token in tokens(170, 1):
                    each.read([token])
            for token in tokens(50, 2):
                context.read([token])
            first = 320 - 256  # of the ring's rows
            assert context.removable_from() == max(first + WINDOW - 1, 100 if rows[0] < 100 else 0)
            if rows[0] > 100:
                assert not context.remove(0, first + WINDOW - 2)
                assert "too far back for the sliding windows" in context.refusal
            assert context.remove(0, 270)
            for token in tokens(40, 3):
                assert nmse(context.read([token]), fresh.read([token])) < 1e-10
            assert context.last() == fresh.last() == 309


def test_a_long_batch_after_others_needs_a_copy(kv_files: Models) -> None:
    """For it writes over rows that a failure would have to bring back; also where no budget evicts anything."""
    with BudgetModel(kv_files["sliding_short"]) as model:
        budget = Budget((999,) * 3, n_copies=0)
        with model.context(768, budget, ubatch=64) as context:
            context.read(tokens(300))
            context.read(tokens(64, 1))
            with pytest.raises(Refused, match="no room for a copy"):
                context.read(tokens(300, 2))
            assert context.last() == 363


@pytest.mark.parametrize(
    "shape",
    [
        Shape("gemma2", n_layer=4, sliding_window=40),
        Shape("gemma3", n_layer=7, sliding_window=40),
        Shape("gpt-oss", n_layer=3, sliding_window=40, n_expert=2),
        Shape("gemma3", n_layer=3, sliding_window=40, slides=(True, False, False)),
        Shape(n_layer=3),
    ],
    ids=lambda shape: f"{shape.arch}-{shape.n_layer}",
)
def test_the_library_and_the_plan_agree_on_the_windows(shape: Shape, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", shape)
    with Model(path) as model:
        assert kv.windows(model) == plan.kv_shape(read_gguf(path)).window
