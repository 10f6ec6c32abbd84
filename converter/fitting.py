"""The step of a conversion that fits the quantization to what the model reads: importance matrix and scales."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ziggurat.converter import compensate_step, embedding, families, fold, linears, scale, scale_groups, weights
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.compensate_step import Arrays, Compensation, Given
from ziggurat.converter.depth import Measuring
from ziggurat.converter.imatrix import Float32, write_imatrix
from ziggurat.converter.scale import ScaleSearch
from ziggurat.converter.scale_groups import Group
from ziggurat.converter.tuning_record import CalibrationRecord, CompensationRecord, ImportanceRecord, ScalesRecord
from ziggurat.converter.upstream import Plan

if TYPE_CHECKING:
    from ziggurat.converter.calibration_text import CalibrationTokens
    from ziggurat.converter.calibration_work import WorkFolder
    from ziggurat.converter.repair import Fold
    from ziggurat.converter.tune import BlockStep, TunedModel

logger = logging.getLogger(__name__)

# Tokens that the importance of the embedding's columns is averaged over.
EMBEDDING_TOKENS = 2048


@dataclass(frozen=True)
class FitSettings:
    """What is gathered or searched in the pass."""

    importance: bool = True
    """Gather an importance matrix."""
    awq: bool = True
    """Search activation-aware scales."""
    compensate: bool = True
    """Choose codes that keep the error of each layer's output small; only with `awq`."""
    export: Path | None = None
    """Where to write the importance matrix too."""

    @property
    def needed(self) -> bool:
        """Whether the pass is needed at all."""
        return self.importance or self.awq

    @property
    def compensates(self) -> bool:
        """Whether errors are compensated."""
        return self.awq and self.compensate


@dataclass(frozen=True)
class Fitted:
    """What the pass gave."""

    plan: Plan
    """With what was found folded in, and the records in its metadata."""
    columns: Mapping[str, Float32]
    """What the columns of its tensors are multiplied by, by name; without those that are not."""
    importance: dict[str, Float32] | None
    """What the tensors of `plan` are quantized with, means by tensor: gathered, or the one given."""
    calibration: CalibrationRecord
    record: ImportanceRecord | None
    """Of the importance matrix; None: none was gathered."""
    scales: ScalesRecord | None
    """None: none were searched."""
    compensation: CompensationRecord | None = None
    """None: errors were not compensated."""
    found: Mapping[int, Arrays] = dataclasses.field(default_factory=dict)
    """What the search for scales found, by place."""


def check(checkpoint: Checkpoint) -> None:
    """Refuse models that cannot be run block by block, before any work.

    Raises:
        UnsupportedModelError: the message says how to convert them nevertheless.
    """
    families.find(checkpoint)
    weights.refuse_quantized(checkpoint)


def importance_names(checkpoint: Checkpoint, plan: Plan, removed: Collection[int] = ()) -> set[str]:
    """Tensors that a gathered importance matrix will have data for."""
    tensors = linears.tensor_names(checkpoint, plan, removed)
    return {*tensors.values(), *([embedding.TENSOR] if _has_embedding_entry(plan, tensors) else [])}


def _has_embedding_entry(plan: Plan, tensors: Mapping[str, str]) -> bool:
    """Whether there is an embedding of which nothing else is made: tied to the head, its columns matter otherwise."""
    return linears.HEAD in tensors and any(tensor.name == embedding.TENSOR for tensor in plan.tensors)


def _embedding_importance(model: TunedModel, tokens: CalibrationTokens) -> Float32:
    import torch

    from ziggurat.converter.calibrate import torch_threads

    block = model.blocks.block(model.kept[0])
    ids = tokens.ids[: max(1, EMBEDDING_TOKENS // tokens.ids.shape[1])]
    with torch_threads(1):  # a short sum: the same whatever the number of threads
        return embedding.column_importance(block, model.blocks.embed(torch.from_numpy(ids.astype("int64"))))


def fit(
    plan: Plan, types: Sequence[int], settings: FitSettings, measuring: Measuring, *,
    importance: dict[str, Float32] | None = None,
    removed: tuple[int, ...] = (), folds: Mapping[int, Fold] | None = None,
) -> Fitted:  # fmt: skip
    """Run the calibration text through the model that will be written, and take what was found into its plan.

    Args:
        plan: of that model.
        types: what its tensors will be quantized to.
        settings: what is wanted.
        measuring: checkpoint, text and how to run it; a killed pass is taken up again from its work folder.
        importance: means by tensor to quantize with where none are gathered.
        removed: blocks of the checkpoint that `plan` is without.
        folds: repair in it, by block of the checkpoint.

    Raises:
        CalibrationError: hidden states are no numbers, the folder is of other inputs, or there is no room.
        OutputError: the importance matrix cannot be exported.
    """
    from ziggurat.converter.importance import gather
    from ziggurat.converter.tune import tune

    tokens, how = measuring.tokens, measuring.settings
    model = _model(plan, measuring, removed, folds)
    tensors = model.tensors
    groups = scale_groups.find(measuring.checkpoint) if settings.awq else ()
    steps: list[BlockStep] = []
    target = {tensor.name: type_id for tensor, type_id in zip(plan.tensors, types, strict=True)}
    weighted = settings.importance or importance is not None
    threads = how.threads or len(os.sched_getaffinity(0))
    if groups:
        steps.append(ScaleSearch(groups, target, plan.model_shape(), weighted, importance, threads=threads))
    if settings.compensates:
        steps.append(Compensation(plan, target, groups, weighted, importance, threads=threads))
    finished = tune(model, tokens, steps, how, measuring.progress)
    calibration = CalibrationRecord(tokens.source, tokens.ids.size, tokens.ids.shape[1], tokens.sha256)
    metadata, record = {**plan.metadata, **calibration.metadata()}, None
    if settings.importance:
        gathered = gather(finished, tensors, tokens)
        for name, experts in gathered.unrouted.items():
            logger.info("%s: no token came to the experts %s, they get the others' mean importance", name, experts)
        matrix, exported = gathered.matrix, None
        if _has_embedding_entry(plan, tensors):
            matrix = matrix.with_entry(embedding.TENSOR, _embedding_importance(model, tokens))
        if settings.export is not None:
            write_imatrix(settings.export, matrix)
            exported = settings.export.name
        importance = matrix.means
        record = ImportanceRecord(len(importance), matrix.chunks, tokens.source, exported, gathered.unrouted)
        metadata.update(record.metadata())
    fitted = Fitted(dataclasses.replace(plan, metadata=metadata), {}, importance, calibration, record, None)
    if groups:
        fitted = _scaled(fitted, groups, finished)
    return _compensated(fitted, target, finished) if settings.compensates else fitted


def compensate(
    fitted: Fitted, plan: Plan, types: Sequence[int], settings: FitSettings, measuring: Measuring, *,
    importance: dict[str, Float32] | None = None,
    removed: tuple[int, ...] = (), folds: Mapping[int, Fold] | None = None,
) -> Fitted:  # fmt: skip
    """Compensate errors in a pass of its own: where types are chosen with the scales that `fit` found.

    Args:
        fitted: without compensation.
        plan: what that was made of.
        types: what the tensors will be quantized to.
        settings: those of `fit`.
        measuring: the same.
        importance: the same.
        removed: the same.
        folds: the same.

    Raises:
        CalibrationError: as `fit`.
        QuantizeError: a tensor has values that its type cannot hold.
    """
    from ziggurat.converter.tune import tune

    groups, model = scale_groups.find(measuring.checkpoint), _model(plan, measuring, removed, folds)
    target = {tensor.name: type_id for tensor, type_id in zip(plan.tensors, types, strict=True)}
    weighted = settings.importance or importance is not None
    threads = measuring.settings.threads or len(os.sched_getaffinity(0))
    compensation = Compensation(plan, target, groups, weighted, importance, threads=threads)
    steps: list[BlockStep] = [Given(scale.NAME, fitted.found), compensation]
    finished = tune(model, measuring.tokens, steps, measuring.settings, measuring.progress, stage="compensation")
    return _compensated(fitted, target, finished)


def _compensated(fitted: Fitted, target: Mapping[str, int], finished: WorkFolder) -> Fitted:
    """With the tensors that were quantized in a pass."""
    from ziggurat.converter.tune import found

    def of_place(place: int) -> Arrays:
        return found(finished, place, compensate_step.NAME)

    losses = [
        compensate_step.losses(found(finished, place, compensate_step.NAME, compensate_step.LOSSES))
        for place in range(finished.finished)
    ]
    record = CompensationRecord.of([loss for of_block in losses for loss in of_block])
    places = {loss.tensor: place for place, of_block in enumerate(losses) for loss in of_block}
    plan = compensate_step.substituted(fitted.plan, target, of_place, places)
    plan = dataclasses.replace(plan, metadata={**plan.metadata, **record.metadata()})
    return dataclasses.replace(fitted, plan=plan, compensation=record)


def _scaled(fitted: Fitted, groups: Sequence[Group], finished: WorkFolder) -> Fitted:
    """With the scales that were found folded in."""
    from ziggurat.converter.tune import found

    arrays = {place: found(finished, place, scale.NAME) for place in range(finished.finished)}
    scales = {place: scale.scales(of_block) for place, of_block in arrays.items()}
    record, columns = ScalesRecord.of(arrays), fold.column_scales(fitted.plan, groups, scales)
    plan = fold.fold(fitted.plan, groups, scales)
    importance = None if fitted.importance is None else fold.scaled_importance(fitted.importance, columns)
    return dataclasses.replace(
        fitted,
        plan=dataclasses.replace(plan, metadata={**plan.metadata, **record.metadata()}),
        columns=columns,
        importance=importance,
        scales=record,
        found=arrays,
    )


def _model(
    plan: Plan, measuring: Measuring, removed: tuple[int, ...], folds: Mapping[int, Fold] | None
) -> TunedModel:  # fmt: skip
    from ziggurat.converter.blocks import Blocks
    from ziggurat.converter.tune import TunedModel

    tensors = linears.tensor_names(measuring.checkpoint, plan, removed)
    blocks = Blocks(measuring.checkpoint, measuring.settings.device, measuring.settings.dtype)
    return TunedModel(blocks, tensors, removed, folds or {})
