"""What the removal of each single block costs, for the greedy criterion: all candidates in one pass over the blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ziggurat.converter.blocks import Blocks
from ziggurat.converter.calibrate import CalibrateSettings, CalibrationProgress, Silent
from ziggurat.converter.calibration_text import CalibrationTokens
from ziggurat.converter.calibration_work import WorkFolder, identity
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
    work: WorkFolder | None = None,
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
        work: where states that do not fit into memory go.

    Raises:
        CalibrationError: the model without `removed` gives hidden states that are no numbers.
    """
    settings, progress = settings or CalibrateSettings(), progress or Silent()
    kept = [i for i in range(blocks.n_layer) if i not in removed]
    losses: dict[int, float] = {}
    with flow(blocks, tokens, settings, progress, copies=len(candidates) + 1, work=work) as stream:
        behind = sum(sum(j > i for j in kept) for i in candidates)
        common_way = sum(j < max(candidates, default=0) for j in kept)
        progress.stage("perplexity without each block", (behind + common_way) * stream.tokens)
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


Losses = Callable[[tuple[int, ...], Sequence[int]], Sequence[float]]


@contextlib.contextmanager
def remembered_losses(
    blocks: Blocks, tokens: CalibrationTokens, settings: CalibrateSettings, progress: CalibrationProgress
) -> Iterator[Losses]:
    """`removal_losses` as a function of `removed` and `candidates` that keeps its answers in the work folder, if any.

    It has to be asked in the order of a search, with one more removed block each time.

    Raises:
        CalibrationError: the work folder is of other inputs, in use or damaged.
    """
    if settings.work is None:
        yield lambda removed, candidates: removal_losses(blocks, tokens, removed, candidates, settings, progress)
        return
    inputs = identity(blocks.checkpoint, tokens, settings)
    with WorkFolder(settings.work / "perplexity", inputs, "perplexity search") as work:

        def losses(removed: tuple[int, ...], candidates: Sequence[int]) -> Sequence[float]:
            number = len(removed)
            if number < work.finished:
                return [float(loss) for loss in work.block(number)["losses"]]
            found = removal_losses(blocks, tokens, removed, candidates, settings, progress, work)
            work.finish(number, {"losses": np.array(found)})
            return found

        yield losses
