"""The step of a conversion that takes blocks out: choose them, repair what remains, cut the plan."""

from __future__ import annotations

import dataclasses

from ziggurat.converter import prune as choice
from ziggurat.converter import prune_families, surgery
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import PruneError
from ziggurat.converter.prune import PruneSettings
from ziggurat.converter.prune_record import BY_LIST, PruneRecord, RepairRecord
from ziggurat.converter.upstream import Plan


def prune(checkpoint: Checkpoint, plan: Plan, settings: PruneSettings) -> tuple[Plan, PruneRecord]:
    """Take blocks out of `plan`, the plan of the whole checkpoint; the record is part of its metadata then.

    Raises:
        PruneError: the family does not stand it, or the blocks asked for cannot go.
    """
    prune_families.family_of(checkpoint)
    n_layer = surgery.block_count(plan)
    if settings.blocks:
        removed, criterion = choice.check_blocks(settings.blocks, n_layer), BY_LIST
    else:
        choice.number_to_remove(settings, n_layer)
        raise PruneError("criteria are not here yet: name the blocks with --prune-blocks")
    repair = RepairRecord("none", "not asked for")
    record = PruneRecord(removed, n_layer, criterion, repair)
    pruned = surgery.remove_blocks(plan, removed)
    return dataclasses.replace(pruned, metadata={**pruned.metadata, **record.metadata()}), record
