"""Kept rows are those of NVIDIA's kvpress, on a random model with grouped heads: snapkv, pyramid, tova, keydiff, h2o.

Skipped unless kvpress is installed, which wants an older transformers than the rest of the tests:

    python -m venv oracle
    oracle/bin/pip install ./patches '.[convert]' -r tests/oracle/requirements.txt
    oracle/bin/python -m pytest tests/oracle -W default

Last run with kvpress 0.5.5, transformers 5.2.0, torch 2.13.0. kvpress has no sinks, counts the window inside the rows
it keeps, and pools each query head's scores before it averages them, which is the same for an average.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetModel, Ints
from helpers.kv_reference import ReferenceSequence, Weights

kvpress = pytest.importorskip("kvpress", reason="needs an environment of its own: see tests/oracle/requirements.txt")

LENGTH, WINDOW = 400, 16
TIE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import families

    return families.build("llama_gqa", tmp_path_factory.mktemp("kvpress") / "model", dtype="float32")


@pytest.fixture(scope="module")
def gguf(folder: Path) -> Path:
    from ziggurat.converter.pipeline import ConvertSettings, convert

    convert(folder, folder.parent / "model.gguf", ConvertSettings(type="f32"))
    return folder.parent / "model.gguf"


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return [int(token) for token in np.random.default_rng(3).integers(3, 250, LENGTH)]


def kept_by(press: Any, folder: Path, prompt: list[int]) -> list[Ints]:
    """Positions of the rows that a press leaves in each layer's cache, found by their keys."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    ids = torch.tensor([prompt])
    full, pressed = transformers.DynamicCache(), transformers.DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=full)
        with press(model):
            model(ids, past_key_values=pressed)
    positions = []
    for all_rows, some in zip(full.layers, pressed.layers, strict=True):
        distances = torch.cdist(
            some.keys[0], all_rows.keys[0], compute_mode="donot_use_mm_for_euclid_dist"
        )  # (KV heads, kept, positions)
        assert float(distances.min(-1).values.max()) < 1e-4
        positions.append(distances.argmin(-1).sort(-1).values.numpy().astype(np.int32))
    return positions


def compare(gguf: Path, prompt: list[int], theirs: list[Ints], **how: Any) -> None:
    """The reference and the library against theirs, whose numbers of rows are taken; `how` is the budget's."""
    budget = Budget(tuple(rows.shape[1] for rows in theirs), **{"window": WINDOW, "sinks": 0, "pool": 5, **how})
    reference = ReferenceSequence(Weights(gguf), budget)
    reference.read(prompt)
    swaps = [reference.swaps(layer, rows, TIE) for layer, rows in enumerate(theirs)]
    assert sum(swaps) <= 1
    with BudgetModel(gguf) as model:
        for ubatch in (64, None):
            with model.context(512, budget, ubatch=ubatch) as context:
                context.read(prompt)
                for layer, rows in enumerate(theirs):
                    different = np.setdiff1d(context.positions(layer) + 1000 * np.arange(len(rows))[:, None],
                                             rows + 1000 * np.arange(len(rows))[:, None])  # fmt: skip
                    assert len(different) <= 1, f"layer {layer}: {different}"


@pytest.mark.parametrize("ratio", [0.5, 0.88])
def test_snapkv(folder: Path, gguf: Path, prompt: list[int], ratio: float) -> None:
    press = kvpress.SnapKVPress(compression_ratio=ratio, window_size=WINDOW, kernel_size=5)
    theirs = kept_by(press, folder, prompt)
    assert all(rows.shape == (2, int(LENGTH * (1 - ratio))) for rows in theirs)
    compare(gguf, prompt, theirs)


def test_pyramidkv(folder: Path, gguf: Path, prompt: list[int]) -> None:
    """The schedule is theirs here: only which rows are kept is compared."""
    press = kvpress.PyramidKVPress(compression_ratio=0.7, window_size=WINDOW, kernel_size=5, beta=5)
    theirs = kept_by(press, folder, prompt)
    assert theirs[0].shape[1] > theirs[-1].shape[1]
    compare(gguf, prompt, theirs)


def always_kept(press: Any, window: int, **options: Any) -> Any:
    """A press of this kind that keeps the last rows in any case, as the library does whatever the score is."""

    class Kept(press):  # type: ignore[misc]
        def score(self, *arguments: Any, **named: Any) -> Any:
            scores = super().score(*arguments, **named)
            scores[..., -window:] = scores.max() + 1
            return scores

    return Kept(**options)


@pytest.mark.parametrize("ratio", [0.5, 0.88])
def test_tova(folder: Path, gguf: Path, prompt: list[int], ratio: float) -> None:
    theirs = kept_by(kvpress.TOVAPress(compression_ratio=ratio), folder, prompt)
    assert all(np.array_equal(rows[0], rows[1]) for rows in theirs)
    compare(gguf, prompt, theirs, score="tova", window=1, pool=1)


@pytest.mark.parametrize("ratio", [0.5, 0.88])
def test_keydiff(folder: Path, gguf: Path, prompt: list[int], ratio: float) -> None:
    press = always_kept(kvpress.KeyDiffPress, WINDOW, compression_ratio=ratio)
    compare(gguf, prompt, kept_by(press, folder, prompt), score="keydiff", pool=1)


@pytest.mark.parametrize("ratio", [0.5, 0.88])
def test_h2o(folder: Path, gguf: Path, prompt: list[int], ratio: float) -> None:
    """Their mean over the queries that see a row, as the sum of H2O's paper."""

    class Summed(kvpress.ObservedAttentionPress):  # type: ignore[misc]
        def score(self, *arguments: Any, **named: Any) -> Any:
            import torch

            means = super().score(*arguments, **named)
            return means * torch.arange(means.shape[-1], 0, -1)

    press = always_kept(Summed, WINDOW, compression_ratio=ratio)
    compare(gguf, prompt, kept_by(press, folder, prompt), score="h2o", pool=1)
