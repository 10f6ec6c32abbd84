"""The models that the tests of the KV budgets run: tiny, random, F32; and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from helpers.kv_library import Budget, BudgetContext, BudgetModel, Floats, Ints, Refused
from helpers.tiny_models import Shape, write_model

#: Heads alike and grouped in every way; in `uneven` another way in each layer.
#: `wide` heads of 64 are rotated before they are quantized, those of 32 are not.
SHAPES = {
    "mha": Shape(n_layer=3, n_head=4, n_head_kv=4),
    "gqa": Shape(n_layer=3, n_head=4, n_head_kv=2),
    "mqa": Shape(n_layer=3, n_head=4, n_head_kv=1),
    "uneven": Shape("deci", n_layer=3, n_head=(4, 4, 4), n_head_kv=(4, 1, 2)),
    "uneven_32": Shape("deci", n_layer=3, n_head=(4, 4, 4), n_head_kv=(4, 1, 2), head_dim=32),
    "head_32": Shape(n_layer=2, n_head=4, n_head_kv=2, head_dim=32),
    "head_96": Shape(n_layer=2, n_head=2, n_head_kv=2, head_dim=96),
    "wide": Shape(n_layer=2, n_head=2, n_head_kv=1, head_dim=64),
    # the middle layer has a window that nearly fills the 256 rows of its ring, or one that leaves room
    "sliding": Shape("gemma2", n_layer=3, sliding_window=230, slides=(False, True, False), softcap=1.5),
    "sliding_short": Shape("gemma2", n_layer=3, sliding_window=30, slides=(False, True, False), softcap=1.5),
    "sliding_wide": Shape(
        "gemma3", n_layer=2, n_head=2, n_head_kv=1, head_dim=64, sliding_window=30, slides=(True, False)
    ),
}

#: For the models of three layers.
BUDGET = Budget((40, 64, 24))


def tokens(n: int, seed: int = 0) -> list[int]:
    """Random ordinary tokens of the tiny models' vocabulary."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, 290, n)]


class Models:
    """Files of the shapes, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Path:
        path = self._folder / f"{name}.gguf"
        return path if path.exists() else write_model(path, SHAPES[name], seed=7)


def first_difference(a: np.ndarray, b: np.ndarray) -> str:
    """Say where two arrays differ, or nothing."""
    if np.array_equal(a, b):
        return ""
    at = np.argwhere(a != b)[0]
    return f"{a[tuple(at)]} != {b[tuple(at)]} at {at.tolist()}, {np.count_nonzero(a != b)} of {a.size} differ"


def prompt(sequence: int) -> list[int]:
    """Of every length: below all budgets, between them, above."""
    return tokens((300, 20, 150, 50, 410, 7, 90, 64)[sequence % 8], 100 + sequence)


def state(context: BudgetContext, sequence: int) -> tuple[int, tuple[int, ...], list[list[list[int]]]]:
    return context.last(sequence), context.rows(sequence), [kept.tolist() for kept in context.kept(sequence)]


def alone(model: BudgetModel, sequence: int, steps: list[int], **options: Any) -> tuple[list[Floats], list[Ints]]:
    """A sequence's prompt and single steps in a context of its own."""
    with model.context(512, BUDGET, **options) as context:
        logits = [context.read(prompt(sequence))]
        logits += [context.read([token]) for token in steps]
        return logits, context.kept()


def faults(run: Callable[[BudgetContext], object], context: BudgetContext, check: Callable[[], object]) -> int:
    """Let every allocation and computation of `run` fail in its turn; `check` after each. How many there were."""
    for n in range(10000):
        context.fail_at(n)
        try:
            run(context)
        except (RuntimeError, Refused):
            check()
            continue
        context.fail_at(-1)
        return n
    raise AssertionError("it never ends")
