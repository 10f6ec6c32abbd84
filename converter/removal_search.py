"""What the removal of each single block costs, for the greedy criterion: all candidates in one pass over the blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings, CalibrationProgress, Silent
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.errors import CalibrationError
from ziggurat.converter.flow import flow
from ziggurat.converter.hidden import HiddenStates


def removal_losses(
    blocks: Blocks,
    tokens: CalibrationTokens,
    removed: Sequence[int],
    candidates: Sequence[int],
    settings: CalibrateSettings | None = None,
    progress: CalibrationProgress | None = None,
) -> list[float]:
    """Mean loss, in nats per token, of the model without `removed` and one candidate at a time.

    A candidate's hidden states begin as a copy of the common ones before it: each block is read once, and each
    candidate goes only through the blocks behind it. A candidate whose states overflow has an infinite loss.

    Args:
        blocks: of the checkpoint.
        tokens: all of them count.
        removed: blocks that are out already.
        candidates: blocks to try, none of them in `removed`.
        settings: device, batch and memory.
        progress: who is told; a step is a token that went through a block.

    Raises:
        CalibrationError: the model without `removed` gives hidden states that are no numbers.
    """
    settings, progress = settings or CalibrateSettings(), progress or Silent()
    kept = [i for i in range(blocks.n_layer) if i not in removed]
    losses: dict[int, float] = {}
    with flow(blocks, tokens, settings, progress, copies=len(candidates) + 1) as stream:
        behind = sum(sum(j > i for j in kept) for i in candidates)
        progress.stage("perplexity without each block", (behind + max(candidates, default=0)) * stream.tokens)
        common = stream.start(stream.all)
        tries: dict[int, HiddenStates] = {}
        for index in kept:
            block = stream.blocks.block(index)
            for candidate, hidden in list(tries.items()):
                try:
                    stream.through(block, hidden, stream.all)
                except CalibrationError:  # that is an answer: not without this one
                    stream.release(tries.pop(candidate))
                    losses[candidate] = float("inf")
            if index in candidates:
                tries[index] = stream.copy(common, stream.all)
            if any(candidate > index for candidate in candidates):
                stream.through(block, common, stream.all)
        losses.update({candidate: stream.loss(hidden, stream.all) for candidate, hidden in tries.items()})
        blocks.release_head()
    return [losses[candidate] for candidate in candidates]
