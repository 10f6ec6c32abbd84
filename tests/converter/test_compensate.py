"""Error compensation: lower loss on inputs it has not seen, never a higher one, the same bytes every time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ziggurat.converter import ggml
from ziggurat.converter.compensate import (
    CompensateSettings,
    Gram,
    Matrix,
    Metric,
    compensate,
    compensate_all,
    quantize_plainly,
    squared_error,
    supported,
)
from ziggurat.converter.descent import descend
from ziggurat.converter.feedback import feed_back, unit_factor
from ziggurat.converter.grids import GRIDS

ROWS, COLUMNS = 24, 512
SETTINGS = CompensateSettings()
F32, Q4_0, Q8_0, Q4_K, IQ2_XXS = 0, 2, 8, 12, 16


@pytest.fixture(params=GRIDS, ids=ggml.type_name)
def type_id(request: pytest.FixtureRequest) -> int:
    ggml.prepare(request.param)
    return int(request.param)


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def metric_of(inputs: torch.Tensor) -> Metric:
    return Gram(inputs.T @ inputs).metric(0.1)


def correlated(tokens: int, seed: int) -> torch.Tensor:
    """Inputs of 64 causes, the size of whose channels differs."""
    mix = torch.from_numpy(np.random.default_rng(0).standard_normal((64, COLUMNS)).astype(np.float32))
    rng = np.random.default_rng(seed)
    causes = torch.from_numpy(rng.standard_normal((tokens, 64)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal((tokens, COLUMNS)).astype(np.float32))
    return (causes @ mix / 8 + 0.3 * noise) * torch.linspace(0.2, 5, COLUMNS)


def matrix(type_id: int, inputs: torch.Tensor) -> Matrix:
    rows = torch.from_numpy(np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32))
    return Matrix(rows, type_id, inputs.square().mean(0).numpy())


def cost(m: Matrix, packed: np.ndarray, gram: torch.Tensor) -> torch.Tensor:
    """What each row's error costs."""
    error = torch.from_numpy(ggml.dequantize_rows(m.type_id, packed, COLUMNS)).double() - m.rows
    return ((error @ gram.double()) * error).sum(1)


def test_loss_on_other_inputs_is_lower(type_id: int, pool: Executor) -> None:
    fit, other = correlated(4096, 2), correlated(512, 3)
    m = matrix(type_id, fit)
    packed = compensate(m, metric_of(fit), SETTINGS, pool)
    assert packed.shape == (ROWS, ggml.row_bytes(type_id, COLUMNS))
    assert squared_error(m, packed, other) < 0.6 * squared_error(m, quantize_plainly(m), other)


def test_descent_lowers_the_cost_of_every_row(type_id: int) -> None:
    fit = correlated(2048, 2)
    m, metric = matrix(type_id, fit), metric_of(fit)
    parts = feed_back(m.rows, metric.factor, type_id, m.importance)
    first = parts.packed(GRIDS[type_id])
    descend(parts, metric.gram, type_id, 2)
    better = parts.packed(GRIDS[type_id])
    before, after = cost(m, first, metric.gram), cost(m, better, metric.gram)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.99 * float(before.sum())


def test_scales_stay_within_what_the_type_can_hold(type_id: int, pool: Executor) -> None:
    fit = correlated(2048, 2)
    m = matrix(type_id, fit)
    m = dataclasses.replace(m, rows=m.rows * torch.logspace(-6, 4, ROWS)[:, None])
    values = ggml.dequantize_rows(type_id, compensate(m, metric_of(fit), SETTINGS, pool), COLUMNS)
    assert np.isfinite(values).all()


def test_with_inputs_that_do_not_correlate_every_value_is_the_nearest() -> None:
    """Then no column can make up for another. (ggml itself rounds with the scale before that becomes a float16.)"""
    ggml.prepare(Q8_0)
    m = dataclasses.replace(matrix(Q8_0, correlated(64, 2)), importance=None)
    packed = feed_back(m.rows, unit_factor(torch.eye(COLUMNS)), Q8_0, None).packed(GRIDS[Q8_0])
    plain = quantize_plainly(m)
    errors, theirs = (np.abs(ggml.dequantize_rows(Q8_0, p, COLUMNS) - m.rows.numpy()) for p in (packed, plain))
    assert (errors <= theirs).all()
    assert (packed != plain).mean() < 0.02


def test_errors_of_a_column_are_made_up_for_by_those_behind_it() -> None:
    """Two inputs that are always equal: what counts is the sum of their weights."""
    ggml.prepare(Q4_0)
    gram = torch.eye(32)
    gram[0, 1] = gram[1, 0] = 0.999
    rows = torch.full((1, 32), 0.4)
    rows[0, -1] = -8.0  # makes the step 1
    packed = feed_back(rows, unit_factor(gram), Q4_0, None).packed(GRIDS[Q4_0])
    values = ggml.dequantize_rows(Q4_0, packed, 32)[0]
    assert values[:2].tolist() == [0.0, 1.0]
    assert values[2:-1].tolist() == [0.0] * 29


@pytest.mark.parametrize("tokens", [8, 64])
def test_it_is_never_worse_on_held_out_inputs(tokens: int, pool: Executor) -> None:
    """Too few tokens to know correlations by: stronger shrinkage, or ggml's own choice."""
    ggml.prepare(Q4_K)
    rng = np.random.default_rng(4)
    fit, other = (torch.from_numpy(rng.standard_t(2, (n, COLUMNS)).astype(np.float32)) for n in (tokens, 256))
    m = matrix(Q4_K, fit)
    [result] = compensate_all([m], fit.T @ fit, other, SETTINGS, pool)
    assert result.loss <= result.plain_loss
    size = float((other @ m.rows.T).square().sum())
    assert squared_error(m, result.packed, other) / size == pytest.approx(result.loss)
    if tokens == 8:
        assert np.isnan(result.shrinkage)
        np.testing.assert_array_equal(result.packed, quantize_plainly(m))


def test_shrinkage_grows_as_tokens_become_fewer(pool: Executor) -> None:
    ggml.prepare(Q4_K)
    other, chosen = correlated(512, 3), []
    for tokens in (32, 4096):
        fit = correlated(tokens, 2)
        [result] = compensate_all([matrix(Q4_K, fit)], fit.T @ fit, other, SETTINGS, pool)
        chosen.append(result.shrinkage)
    assert chosen[0] > chosen[1]


@pytest.mark.parametrize("type_id", [Q4_0, Q4_K])
def test_the_same_bytes_every_time_and_by_any_parts(type_id: int, pool: Executor) -> None:
    ggml.prepare(type_id)
    fit = correlated(1024, 2)
    m, metric = matrix(type_id, fit), metric_of(fit)
    once = compensate(m, metric, SETTINGS, pool)
    np.testing.assert_array_equal(compensate(m, metric, SETTINGS, pool), once)
    # products of matrices of other shapes are summed in another order: near ties may fall either way
    parts = compensate(m, metric, dataclasses.replace(SETTINGS, values=8 * COLUMNS), pool)
    assert (parts != once).mean() < 0.02


def test_rows_do_not_depend_on_each_other(pool: Executor) -> None:
    ggml.prepare(Q4_K)
    fit = correlated(1024, 2)
    m, metric = matrix(Q4_K, fit), metric_of(fit)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    packed = compensate(m, metric, SETTINGS, pool)
    permuted = compensate(dataclasses.replace(m, rows=m.rows[order]), metric, SETTINGS, pool)
    np.testing.assert_array_equal(permuted, packed[order.numpy()])


def test_columns_that_are_always_zero_are_rounded_as_ever(pool: Executor) -> None:
    ggml.prepare(Q8_0)
    fit = correlated(1024, 2)
    fit[:, 40:50] = 0
    m = matrix(Q8_0, fit)
    packed = compensate(m, metric_of(fit), SETTINGS, pool)
    values = ggml.dequantize_rows(Q8_0, packed, COLUMNS)[:, 40:50]
    plain = ggml.dequantize_rows(Q8_0, quantize_plainly(m), COLUMNS)[:, 40:50]
    assert np.abs(values - plain).max() < 0.1


def test_what_is_not_supported_is_said() -> None:
    assert supported(Q4_K, 512, SETTINGS)
    assert not supported(Q4_K, 320, SETTINGS)
    assert not supported(IQ2_XXS, 512, SETTINGS)
    assert not supported(F32, 512, SETTINGS)
    assert not supported(Q4_K, SETTINGS.columns + 256, SETTINGS)
