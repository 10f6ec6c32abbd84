"""Every architecture: read layer by layer, or in the lane, or run without a budget and with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetModel, Part
from helpers.kv_models import tokens
from helpers.kv_reference import ReferenceSequence, Weights
from helpers.stock import nmse
from helpers.tiny_models import Shape, write_model
from helpers.unfit_models import write_bloom, write_mamba

FIT = {
    "llama": Shape(),
    "mixtral": Shape(n_expert=4),
    "qwen2": Shape("qwen2"),
    "qwen3": Shape("qwen3"),
    "qwen3moe": Shape("qwen3moe", n_expert=4),
    "phi3": Shape("phi3"),
    "granite": Shape("granite"),
    # the last layer of each period sees everything
    "gemma2": Shape("gemma2", sliding_window=50, softcap=1.5),
    "gemma3": Shape("gemma3", n_layer=6, sliding_window=50),
    "gpt-oss": Shape("gpt-oss", sliding_window=50, n_expert=2),
}
UNFIT: dict[str, Callable[[Path], Path]] = {
    "only sliding windows": lambda path: write_model(path, Shape("gemma3", n_layer=3, sliding_window=64)),
    "linear biases": write_bloom,
    "recurrent": write_mamba,
}


@pytest.mark.parametrize(("prefill", "flash"), [("bounded", False), ("bounded", True), ("lane", False)])
@pytest.mark.parametrize("name", FIT)
def test_architectures(name: str, prefill: str, flash: bool, tmp_path: Path) -> None:
    """Kept rows, prompt logits and logits after eviction, two turns. Bounded: layer by layer or not at all."""
    path = write_model(tmp_path / "m.gguf", FIT[name], seed=5)
    budget = Budget((40, 24) * (FIT[name].n_layer // 2), prefill=prefill)
    weights = Weights(path)
    limit = 1e-4 if flash else 1e-6  # flash attention rounds to F16, which can move a token to another expert
    with BudgetModel(path) as model:
        assert model.unsupported is None
        for ubatch in (32, None):
            reference = ReferenceSequence(weights, budget)
            with model.context(512, budget, ubatch=ubatch, flash=flash) as context:
                layout = context.layout()
                assert layout is not None
                assert layout.layer_major == (prefill == "bounded")
                for turn in range(2):
                    wanted = reference.read(tokens(200, turn))
                    got = context.read(tokens(200, turn), every=True)
                    assert nmse(got, wanted.astype(np.float32)) < limit
                    kept = context.kept()
                    for layer, rows in enumerate(kept):
                        reference.swaps(layer, rows, 3e-3 if flash else 1e-4)
                    reference.select(kept)
                    for token in tokens(3, 9):
                        assert nmse(context.read([token]), reference.read([token]).astype(np.float32)) < limit


FAMILIES = FIT | {
    "gpt2": Shape("gpt2", n_head_kv=4),
    "olmo2": Shape("olmo2"),
    "olmo2, sliding": Shape("olmo2", n_layer=4, sliding_window=50),
}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_layer_by_layer_is_the_lane_to_the_last_bit(name: str, flash: bool, tmp_path: Path) -> None:
    """For every family that the converter is tested on; and a prompt's logits are those without a budget."""
    with BudgetModel(write_model(tmp_path / "m.gguf", FAMILIES[name], seed=6)) as model:
        options: dict[str, Any] = {"ubatch": 48, "flash": flash}
        with model.context(512, **options) as stock:
            wanted = [stock.read(tokens(300), every=True)]
        found = []
        for prefill in ("bounded", "lane"):
            budget = Budget((40,) * model.n_layer, prefill=prefill)
            with model.context(512, budget, **options) as context:
                got = [context.read(tokens(300), every=True)]
                got += [context.read(tokens(n, n)) for n in (1, 1, 70, 1)]
                found.append((got, context.kept()))
        (layers, kept), (lane, kept_in_lane) = found
        assert all(np.array_equal(a, b) for a, b in zip(layers, wanted, strict=False))
        assert all(np.array_equal(a, b) for a, b in zip(layers, lane, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(kept, kept_in_lane, strict=True))


@pytest.mark.parametrize("prefill", ["bounded", "lane"])
def test_the_lane_keeps_what_layers_keep(prefill: str, kv_model: BudgetModel) -> None:
    """Several sequences, one after the other, each over the others' remains in the shared stage."""
    exact, other = Budget((40, 64, 24)), Budget((40, 64, 24), prefill=prefill)
    with kv_model.context(512, other, n_seq=3, ubatch=64) as context:
        context.decode(*(Part(sequence, tokens(150 + 90 * sequence, sequence)) for sequence in range(3)))
        kept = [context.kept(sequence) for sequence in range(3)]
    for sequence in range(3):
        with kv_model.context(512, exact, ubatch=64) as single:
            single.read(tokens(150 + 90 * sequence, sequence))
            assert all(np.array_equal(a, b) for a, b in zip(kept[sequence], single.kept(), strict=True))


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
