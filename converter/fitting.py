"""The step of a conversion that fits the quantization to what the model reads: importance matrix and scales."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ziggurat.converter import families, linears, weights
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.depth import Measuring
from ziggurat.converter.imatrix import Float32, write_imatrix
from ziggurat.converter.report import Estimate
from ziggurat.converter.tuning_record import CalibrationRecord, ImportanceRecord
from ziggurat.converter.upstream import Plan

if TYPE_CHECKING:
    from ziggurat.converter.repair import Fold
    from ziggurat.converter.tune import BlockStep

logger = logging.getLogger(__name__)

# A matrix product of this many rows tells how fast a pass will be.
TRIAL_ROWS, TRIAL_COLUMNS = 512, 1024


@dataclass(frozen=True)
class FitSettings:
    """What is gathered or searched in the pass."""

    importance: bool = True
    """Gather an importance matrix."""
    awq: bool = True
    """Search activation-aware scales."""
    export: Path | None = None
    """Where to write the importance matrix too."""

    @property
    def needed(self) -> bool:
        """Whether the pass is needed at all."""
        return self.importance


@dataclass(frozen=True)
class Fitted:
    """What the pass gave."""

    plan: Plan
    """With what was found folded in, and the records in its metadata."""
    importance: dict[str, Float32] | None
    """Means by tensor; None: none was gathered."""
    calibration: CalibrationRecord
    record: ImportanceRecord | None


def check(checkpoint: Checkpoint) -> None:
    """Refuse models that cannot be run block by block, before any work.

    Raises:
        UnsupportedModelError: the message says how to convert them nevertheless.
    """
    families.find(checkpoint)
    weights.refuse_quantized(checkpoint)


def importance_names(checkpoint: Checkpoint, plan: Plan, removed: Collection[int] = ()) -> set[str]:
    """Tensors that a gathered importance matrix will have data for."""
    return set(linears.tensor_names(checkpoint, plan, removed).values())


def fit(
    plan: Plan, settings: FitSettings, measuring: Measuring, *,
    removed: tuple[int, ...] = (), folds: Mapping[int, Fold] | None = None,
) -> Fitted:  # fmt: skip
    """Run the calibration text through the model that will be written, and take what was found into its plan.

    Args:
        plan: of that model.
        settings: what is wanted.
        measuring: checkpoint, text and how to run it; a killed pass is taken up again from its work folder.
        removed: blocks of the checkpoint that `plan` is without.
        folds: repair in it, by block of the checkpoint.

    Raises:
        CalibrationError: hidden states are no numbers, the folder is of other inputs, or there is no room.
        OutputError: the importance matrix cannot be exported.
    """
    from ziggurat.converter import importance
    from ziggurat.converter.blocks import Blocks
    from ziggurat.converter.tune import TunedModel, tune

    tokens, how = measuring.tokens, measuring.settings
    tensors = linears.tensor_names(measuring.checkpoint, plan, removed)
    model = TunedModel(Blocks(measuring.checkpoint, how.device, how.dtype), tensors, removed, folds or {})
    finished = tune(model, tokens, _steps(settings), how, measuring.progress)
    calibration = CalibrationRecord(tokens.source, tokens.ids.size, tokens.ids.shape[1], tokens.sha256)
    metadata, record, means = {**plan.metadata, **calibration.metadata()}, None, None
    if settings.importance:
        gathered = importance.gather(finished, tensors, tokens)
        for name, experts in gathered.unrouted.items():
            logger.info("%s: no token came to the experts %s, they get the others' mean importance", name, experts)
        matrix, exported = gathered.matrix, None
        if settings.export is not None:
            write_imatrix(settings.export, matrix)
            exported = settings.export.name
        means = matrix.means
        record = ImportanceRecord(len(means), matrix.chunks, tokens.source, exported, gathered.unrouted)
        metadata.update(record.metadata())
    return Fitted(dataclasses.replace(plan, metadata=metadata), means, calibration, record)


def _steps(settings: FitSettings) -> Sequence[BlockStep]:
    """What is searched for each block."""
    return []


def add_cost(estimate: Estimate, plan: Plan, measuring: Measuring) -> Estimate:
    """An estimate with the pass: time from that of a small matrix product, memory from the largest block."""
    sizes: dict[str, int] = {}
    active = 0.0
    experts, used = plan.value("{arch}.expert_count", 0), plan.value("{arch}.expert_used_count", 0)
    for tensor in plan.tensors:
        if not tensor.name.startswith("blk."):
            continue
        block, count = tensor.name.split(".")[1], math.prod(tensor.shape)
        sizes[block] = sizes.get(block, 0) + count
        active += count * used / experts if "_exps" in tensor.name and experts else count
    tokens, n_embd = measuring.tokens.ids.size, int(plan.value("{arch}.embedding_length", 0))
    hidden = 4 * tokens * n_embd
    kept = hidden if hidden <= measuring.settings.memory_share * psutil.virtual_memory().available else 0
    held = psutil.Process().memory_info().rss + 4 * max(sizes.values(), default=0) + kept
    return dataclasses.replace(
        estimate,
        seconds=estimate.seconds + active * tokens * _seconds_per_product(measuring.settings.threads),
        memory_bytes=max(estimate.memory_bytes, held),
    )


def _seconds_per_product(threads: int | None) -> float:
    """Seconds per multiplication of a weight with an activation."""
    import torch

    from ziggurat.converter.calibrate import torch_threads

    with torch_threads(threads):
        a, b = torch.ones(TRIAL_ROWS, TRIAL_COLUMNS), torch.ones(TRIAL_COLUMNS, TRIAL_COLUMNS)
        a @ b
        start = time.perf_counter()
        a @ b
        return (time.perf_counter() - start) / (TRIAL_ROWS * TRIAL_COLUMNS * TRIAL_COLUMNS)
