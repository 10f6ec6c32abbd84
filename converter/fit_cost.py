"""What fitting the quantization to the model will take: time in units of a small matrix product, memory by block."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator

import psutil

from ziggurat.converter.depth import Measuring
from ziggurat.converter.fitting import FitSettings
from ziggurat.converter.report import Estimate
from ziggurat.converter.scale import ScaleSettings
from ziggurat.converter.upstream import Plan

# A matrix product of this size tells how fast a pass will be.
TRIAL_ROWS, TRIAL_COLUMNS = 1024, 1024

# Multiplications that other work takes as long as, measured on blocks of the 1B shape: to quantize a value with an
# importance matrix; of each weight, to run a part of a block with finalists among scales; to compensate it, products
# aside, of which there are 2.5 per column and 4096 with held-out tokens.
QUANTIZE, FINALS, COMPENSATION, HELD_OUT, PER_COLUMN = 11_000, 10_000, 17_000, 4096, 2.5
# Of a mix: forward and backward, and the types that some rows are tried in.
BACKWARD, TYPES, MIX_ROWS = 3, 20, 256


def add_cost(estimate: Estimate, plan: Plan, measuring: Measuring, settings: FitSettings, *, mixed: bool) -> Estimate:
    """An estimate with the passes over the calibration text.

    Args:
        estimate: without them.
        plan: of the model that will be run.
        measuring: the text and how it is run.
        settings: what is searched.
        mixed: whether types are chosen by losses.
    """
    sizes: dict[str, int] = {}
    for name, count, *_ in _matrices(plan):
        block = name.split(".")[1]
        sizes[block] = sizes.get(block, 0) + count
    n_embd = int(plan.value("{arch}.embedding_length", 0))
    hidden = 4 * measuring.tokens.ids.size * n_embd
    kept = hidden if hidden <= measuring.settings.memory_share * psutil.virtual_memory().available else 0
    held = psutil.Process().memory_info().rss + 4 * max(sizes.values(), default=0) + kept
    products = _products(plan, measuring.tokens.ids.size, settings, mixed)
    return dataclasses.replace(
        estimate,
        seconds=estimate.seconds + products * _seconds_per_product(measuring.settings.threads),
        memory_bytes=max(estimate.memory_bytes, held),
    )


def _matrices(plan: Plan) -> Iterator[tuple[str, int, float, int, bool]]:
    """Of the blocks' tensors: name, values, how many of them a token meets, columns, and whether it is one matrix."""
    experts, used = plan.value("{arch}.expert_count", 0), plan.value("{arch}.expert_used_count", 0)
    for tensor in plan.tensors:
        if tensor.name.startswith("blk."):
            count = math.prod(tensor.shape)
            active = count * used / experts if "_exps" in tensor.name and experts else count
            yield tensor.name, count, active, tensor.shape[-1], len(tensor.shape) == 2


def _products(plan: Plan, tokens: int, settings: FitSettings, mixed: bool) -> float:
    total, scales = 0.0, ScaleSettings()
    for _, count, active, columns, single in _matrices(plan):
        passes = 1 + (BACKWARD if mixed else 0) + (1 if mixed and settings.compensates else 0)
        total += active * tokens * passes + (TYPES * QUANTIZE * min(count, MIX_ROWS * columns) if mixed else 0)
        if settings.awq:
            tried = 2 * scales.grid * min(count, scales.values)
            tried += (scales.finalists + 1) * min(count, scales.final_values)
            total += tried * QUANTIZE + count * FINALS
        if settings.compensates and single:
            total += count * (PER_COLUMN * columns + HELD_OUT + COMPENSATION)
            total += columns**2 * (tokens + columns) / 2  # of inputs, which tensors share: Gram matrix and its factors
    return total


def _seconds_per_product(threads: int | None) -> float:
    """Seconds per multiplication of a weight with an activation."""
    import torch

    from ziggurat.converter.calibrate import rounded_products, torch_threads

    with torch_threads(threads), rounded_products():
        a, b = torch.ones(TRIAL_ROWS, TRIAL_COLUMNS), torch.ones(TRIAL_COLUMNS, TRIAL_COLUMNS)
        a @ b
        start = time.perf_counter()
        a @ b
        return (time.perf_counter() - start) / (TRIAL_ROWS * TRIAL_COLUMNS * TRIAL_COLUMNS)
