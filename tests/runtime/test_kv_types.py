"""Rows of every type, K and V apart: moved as they are, bit for bit, and chosen by the keys that are really there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.kv_library import Budget, BudgetContext, BudgetModel
from helpers.kv_models import Models, first_difference, tokens
from helpers.kv_reference import Weights
from helpers.kv_rows import LayerBytes, layers_in, layers_of, numbers_at, reference_of

TYPES = ("f16", "bf16", "q8_0", "q4_0")
PAIRS = [*zip(TYPES, TYPES, strict=True), ("bf16", "q4_0"), ("q8_0", "f16"), ("q4_0", "bf16"), ("f16", "q8_0")]
LENGTH = 300
BUDGET = Budget((40, 24))
KEEPS_ALL = Budget((512, 512), score="recent")
# Products of a window's queries with stored keys in F32, and the same in F64
TIE = 1e-4


def kept_bytes(before: list[LayerBytes], context: BudgetContext) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of whole layers the rows that a context has kept."""
    return [
        (np.take_along_axis(layer.keys, at[:, :, None], 1), np.take_along_axis(layer.values, at[:, :, None], 1))
        for layer, at in zip(before, context.kept(), strict=True)
    ]


def check_same(rows: list[LayerBytes], wanted: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for index, (layer, (keys, values)) in enumerate(zip(rows, wanted, strict=True)):
        for name, got, want in (("K", layer.keys, keys), ("V", layer.values, values)):
            difference = first_difference(got[:, : want.shape[1]], want)
            assert not difference, f"{name} of layer {index}: {difference}"


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("shape", ["head_32", "head_96", "wide"])
@pytest.mark.parametrize("prefill", ["exact", "lane"])
def test_a_prompt_leaves_the_rows_that_its_keys_name(
    kv_files: Models, shape: str, pair: tuple[str, str], prefill: str
) -> None:
    """Beside a full cache of the same types: eviction adds nothing to what storing did."""
    weights, budget = Weights(kv_files[shape]), replace(BUDGET, prefill=prefill)
    with BudgetModel(kv_files[shape]) as model:
        with model.context(512, KEEPS_ALL, types=pair, flash=True, ubatch=64) as full:
            full.read(tokens(LENGTH))
            before = layers_in(full, weights, KEEPS_ALL, pair)
        with model.context(512, budget, types=pair, flash=True, ubatch=64) as context:
            context.read(tokens(LENGTH))
            after = layers_in(context, weights, budget, pair)
            first = kept_bytes(before, context)
            check_same(after, first)
            reference = reference_of(weights, budget, pair, before, after)
            assert sum(reference.swaps(layer, kept, TIE) for layer, kept in enumerate(context.kept())) <= 2
            # a second prompt is read into a copy, through the stage: what it leaves of the first is still the same
            context.read(tokens(90, 1))
            old = [kept < LENGTH for kept in context.kept()]
            later = layers_in(context, weights, budget, pair)
            for layer, mask, rows in zip(range(2), old, later, strict=True):
                for head, some in enumerate(mask):
                    at = context.positions(layer)[head][some]
                    assert np.array_equal(rows.keys[head][some], before[layer].keys[head][at])
                    assert np.array_equal(rows.values[head][some], before[layer].values[head][at])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("shape", ["head_32", "wide"])
def test_a_selection_in_place_copies_and_saved_rows(kv_files: Models, shape: str, pair: tuple[str, str]) -> None:
    """One sequence before it selects, its copy after; what was restored selects the same."""
    weights, budget = Weights(kv_files[shape]), Budget((256, 256))
    with BudgetModel(kv_files[shape]) as model:
        with model.context(512, budget, types=pair, flash=True, n_seq=2, ubatch=64) as context:
            context.read(tokens(250))
            before = layers_in(context, weights, budget, pair)
            context.copy(0, 1)
            assert context.set_budget(0, (40, 24)) == 0
            assert context.select(0) == 2
            after = layers_in(context, weights, budget, pair)
            check_same(after, kept_bytes(before, context))
            reference = reference_of(weights, budget, pair, before, after)
            reference.budget = Budget((40, 24))
            assert sum(reference.swaps(layer, kept, TIE) for layer, kept in enumerate(context.kept())) <= 2
            check_same(layers_in(context, weights, budget, pair, 1), [(layer.keys, layer.values) for layer in before])
            branch, kept = context.saved(1), context.kept()
            context.restore(branch, 0)
            assert context.saved(0)[8:] == branch[8:]  # but for the header, which names the sequence
            assert context.set_budget(0, (40, 24)) == 0
            assert context.select(0) == 2
            assert all(np.array_equal(a, b) for a, b in zip(context.kept(), kept, strict=True))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("shape", ["head_32", "head_96", "wide"])
def test_any_bits_are_moved(kv_files: Models, shape: str, pair: tuple[str, str]) -> None:
    """Also of rows that no computation makes: NaNs of every kind, scales without a number."""
    weights, budget = Weights(kv_files[shape]), Budget((256, 256), score="recent")
    with BudgetModel(kv_files[shape]) as model:
        with model.context(512, budget, types=pair, flash=True, ubatch=64) as context:
            context.read(tokens(250))
            state = bytearray(context.saved(0))
            start = numbers_at(weights.n_layer) + 4 * (2 + 3 * weights.n_layer)
            state[start:] = np.random.default_rng(1).integers(0, 256, len(state) - start, np.uint8).tobytes()
            context.restore(bytes(state), 0)
            assert context.set_budget(0, (40, 24)) == 0
            assert context.select(0) == 2
            wanted = kept_bytes(list(layers_of(bytes(state), weights, budget, pair)), context)
            check_same(layers_in(context, weights, budget, pair), wanted)
