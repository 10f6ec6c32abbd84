"""Every architecture: read layer by layer, or in the lane, or run without a budget and with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetModel, Refused
from helpers.kv_models import tokens
from helpers.kv_reference import ReferenceSequence, Weights
from helpers.stock import nmse
from helpers.tiny_models import Shape, write_model
from helpers.unfit_models import write_bloom, write_mamba

BUDGET = Budget((40, 24))
LAYER_MAJOR = {
    "llama": Shape(),
    "mixtral": Shape(n_expert=4),
    "qwen2": Shape("qwen2"),
    "qwen3": Shape("qwen3"),
    "qwen3moe": Shape("qwen3moe", n_expert=4),
    "phi3": Shape("phi3"),
}
LANE = {"granite": Shape("granite")}
UNFIT: dict[str, Callable[[Path], Path]] = {
    "sliding window, soft caps": lambda path: write_model(path, Shape("gemma2", sliding_window=64)),
    "sliding window": lambda path: write_model(path, Shape("gemma3", n_layer=6, sliding_window=64)),
    "linear biases": write_bloom,
    "recurrent": write_mamba,
}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", [*LAYER_MAJOR, *LANE])
def test_architectures(name: str, flash: bool, tmp_path: Path) -> None:
    """Kept rows, prompt logits and logits after eviction, two turns."""
    path = write_model(tmp_path / "m.gguf", {**LAYER_MAJOR, **LANE}[name], seed=5)
    reference = ReferenceSequence(Weights(path), BUDGET)
    with BudgetModel(path) as model:
        assert model.unsupported is None
        for ubatch in (32, None):
            reference = ReferenceSequence(reference.w, BUDGET)
            with model.context(512, BUDGET, ubatch=ubatch, flash=flash) as context:
                layout = context.layout()
                assert layout is not None
                assert layout.layer_major == (name in LAYER_MAJOR)
                for turn in range(2):
                    wanted = reference.read(tokens(200, turn))
                    got = context.read(tokens(200, turn), every=True)
                    assert nmse(got, wanted.astype(np.float32)) < 1e-6
                    kept = context.kept()
                    assert sum(reference.swaps(layer, rows, 1e-3) for layer, rows in enumerate(kept)) <= 1
                    reference.select(kept)
                    for token in tokens(3, 9):
                        assert nmse(context.read([token]), reference.read([token]).astype(np.float32)) < 1e-6


@pytest.mark.parametrize("name", LANE)
def test_several_sequences_share_the_lane(name: str, tmp_path: Path) -> None:
    with BudgetModel(write_model(tmp_path / "m.gguf", LANE[name], seed=5)) as model:
        with model.context(512, BUDGET, n_seq=3, ubatch=64) as context:
            for sequence in range(3):
                context.read(tokens(150 + 90 * sequence, sequence), sequence)
            kept = [context.kept(sequence) for sequence in range(3)]
        for sequence in range(3):
            with model.context(512, BUDGET, ubatch=64) as single:
                single.read(tokens(150 + 90 * sequence, sequence))
                assert all(np.array_equal(a, b) for a, b in zip(kept[sequence], single.kept(), strict=True))


@pytest.mark.parametrize("name", ["llama", *LANE])
def test_bounded_prefill_never_takes_the_lane(name: str, tmp_path: Path) -> None:
    budget = Budget((40, 24), prefill="bounded")
    with BudgetModel(write_model(tmp_path / "m.gguf", {**LAYER_MAJOR, **LANE}[name], seed=5)) as model:
        if name in LANE:
            with pytest.raises(Refused):
                model.context(512, budget)
            return
        with model.context(512, budget) as context, model.context(512, BUDGET) as exact:
            assert np.array_equal(context.read(tokens(300)), exact.read(tokens(300)))
            assert all(np.array_equal(a, b) for a, b in zip(context.kept(), exact.kept(), strict=True))


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_budgets_do_not_fit_run_without(name: str, tmp_path: Path) -> None:
    with BudgetModel(UNFIT[name](tmp_path / "m.gguf")) as model:
        assert model.unsupported is not None
        assert len(model.unsupported) > 10
        budget = Budget((40,) * model.n_layer)
        with model.context(512, budget, types=("f16", "f16")) as context:
            assert not context.active
            got = context.read(tokens(200))
        with model.context(512, types=("f16", "f16")) as stock:
            assert np.array_equal(got, stock.read(tokens(200)))
