"""The step of a conversion that takes blocks out: choose them, repair what remains, cut the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ziggurat.converter import prune as choice
from ziggurat.converter import prune_families, surgery
from ziggurat.converter.calibration_text import CalibrationTokens, TextSettings, read_tokens
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.prune import PruneSettings
from ziggurat.converter.prune_record import BY_LIST, PruneRecord, RepairRecord
from ziggurat.converter.upstream import Plan, PlannedTensor

if TYPE_CHECKING:
    from ziggurat.converter.calibrate import CalibrateSettings, Calibration, CalibrationProgress
    from ziggurat.converter.repair import Fold
    from ziggurat.converter.repair_pass import Repaired

METHOD = "least-squares"


@dataclass(frozen=True)
class Measuring:
    """What everything that runs the calibration text needs; nothing is read before it is asked for."""

    checkpoint: Checkpoint
    text: TextSettings
    settings: CalibrateSettings
    progress: CalibrationProgress
    _made: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tokens(self) -> CalibrationTokens:
        """The calibration tokens."""
        if "tokens" not in self._made:
            self._made["tokens"] = read_tokens(self.checkpoint, self.text)
        tokens: CalibrationTokens = self._made["tokens"]
        return tokens

    @property
    def calibration(self) -> Calibration:
        """Influence and angular distances of the whole model."""
        if "calibration" not in self._made:
            from ziggurat.converter.calibrate import calibrate

            self._made["calibration"] = calibrate(self.checkpoint, self.tokens, self.settings, self.progress)
        calibration: Calibration = self._made["calibration"]
        return calibration

    def choose(self, by: choice.Criterion, n: int, before: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The `n` blocks that a criterion removes; the greedy one goes on from `before`, its choice of fewer."""
        if by == "influence":
            return choice.by_influence(self.calibration.influence, n)
        if by == "angular":
            assert self.calibration.angular is not None
            return choice.by_angular(self.calibration.angular, n)
        from ziggurat.converter.blocks import Blocks
        from ziggurat.converter.removal_search import remembered_losses

        blocks = Blocks(self.checkpoint, self.settings.device, self.settings.dtype)
        with remembered_losses(blocks, self.tokens, self.settings, self.progress) as losses:
            return choice.by_perplexity(losses, blocks.n_layer, n, before)

    def cut(self, removed: tuple[int, ...], *, repair: bool = True, uncorrected: tuple[int, ...] = ()) -> Repaired:
        """The model without blocks, measured on held-out tokens with and without repair."""
        from ziggurat.converter import repair_pass
        from ziggurat.converter.blocks import Blocks
        from ziggurat.converter.correction import RepairSettings

        blocks = Blocks(self.checkpoint, self.settings.device, self.settings.dtype)
        how = RepairSettings(skip=uncorrected) if repair else None
        return repair_pass.cut(blocks, self.tokens, removed, self.settings, how, self.progress)


@dataclass(frozen=True)
class Pruned:
    """A plan without some blocks."""

    plan: Plan
    """The record is part of its metadata."""
    record: PruneRecord
    folds: Mapping[int, Fold]
    """Repair that is in the plan, by block of the checkpoint."""


def prune(checkpoint: Checkpoint, plan: Plan, settings: PruneSettings, measuring: Measuring) -> Pruned:
    """Take blocks out of `plan`, the plan of the whole checkpoint.

    Raises:
        PruneError: the family does not stand it or cannot be repaired, or the blocks asked for cannot go.
        CalibrationError: the calibration text or the hidden states on it will not do.
        UnsupportedModelError: blocks of the family cannot be computed one at a time.
    """
    prune_families.check_prunable(checkpoint)
    if settings.repair:
        prune_families.check_repairable(checkpoint)
    n_layer = surgery.block_count(plan)
    if settings.blocks:
        removed = choice.check_blocks(settings.blocks, n_layer)
    else:
        removed = measuring.choose(settings.by, choice.number_to_remove(settings, n_layer))
    plan_without = surgery.remove_blocks(plan, removed)  # what it refuses, it refuses before the repair's work
    record = RepairRecord("none", "not asked for")
    folds: Mapping[int, Fold] = {}
    if settings.repair:
        record, folds = _repair(measuring.cut(removed, uncorrected=settings.uncorrected))
    measured = settings.repair or not settings.blocks
    done = PruneRecord(
        removed, n_layer, BY_LIST if settings.blocks else settings.by, record,
        calibration=measuring.tokens.sha256 if measured else None,
        calibration_tokens=measuring.tokens.ids.size if measured else None,
    )  # fmt: skip
    places = surgery.renumber(n_layer, removed)
    cut = Plan(
        plan.arch,
        {**plan_without.metadata, **done.metadata()},
        [_folded(tensor, {places[i]: fold for i, fold in folds.items()}) for tensor in plan_without.tensors],
    )
    return Pruned(cut, done, folds)


def _repair(repaired: Repaired) -> tuple[RepairRecord, Mapping[int, Fold]]:
    record = RepairRecord(
        METHOD,
        loss_whole=repaired.loss_whole,
        loss_pruned=repaired.loss_pruned,
        loss_repaired=repaired.loss_repaired,
        divergence_pruned=repaired.divergence_pruned,
        divergence_repaired=repaired.divergence_repaired,
    )
    if not repaired.helps:
        reason = "on held-out calibration tokens the predictions are no nearer to the whole model's with it"
        return dataclasses.replace(record, method="none", reason=reason), {}
    ridge = tuple(repaired.ridge[i] for i in repaired.folds)
    return dataclasses.replace(record, blocks=tuple(repaired.folds), ridge=ridge), repaired.folds


def _folded(tensor: PlannedTensor, folds: Mapping[int, Fold]) -> PlannedTensor:
    """The tensor with the correction of its block folded in when it is read, if it is a down projection."""
    parts = tensor.name.split(".")
    if parts[0] != "blk" or parts[2] not in surgery.DOWN_PROJECTIONS or int(parts[1]) not in folds:
        return tensor
    fold = folds[int(parts[1])]
    change: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]] = fold.bias if parts[3] == "bias" else fold.weight
    return dataclasses.replace(tensor, load=lambda: change(tensor.load()))
